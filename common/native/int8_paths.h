// The arithmetic of int8.cpp: elementwise functions, and the product of a tile with a block, in three paths.
//
// All paths give the same bits: sums are exact integers, and every float operation is a single IEEE operation
// in a fixed order. Compile with -ffp-contract=off: no path may fuse a multiplication and an addition.
//
// Shapes: K in-features, N out-features, G = K / 4 rounded up to a multiple of 4, B = N / 16 rounded up.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "elementwise.h"
#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace int8 {

constexpr int64_t kOut = 16;   // outputs of a block
constexpr int64_t kTile = 16;  // most rows of a tile: as many sums as registers hold
// Fewer rows than this are the only tile of their job: weights are read once, and need not stay in a cache.
constexpr int64_t kRowsOfHalfTile = kTile / 2;
constexpr int64_t kPrefetchBytes = 8192;

// Weights are kept as uint8, weight + 128: an instruction that takes unsigned weights can take rows from
// memory. The 128 is taken off again with the sum of the row. A block is one sequential stream of memory:
// [G, 16, 4] weights, then [16] float scales, then [16] int32 bias, which joins the integer sums.
struct Block {
  const uint8_t* codes;
  int64_t groups;

  const float* scales() const { return reinterpret_cast<const float*>(codes + groups * 64); }
  const int32_t* bias() const { return reinterpret_cast<const int32_t*>(codes + groups * 64 + 64); }
};

struct Weight {
  const uint8_t* blocks;  // [B] blocks of block_bytes(groups) each
  int64_t k, n;
};

inline int64_t groups_of(int64_t k) { return ceil_div(k, 16) * 4; }
inline int64_t block_bytes(int64_t groups) { return groups * 64 + 128; }

// Some rows, as the path lays them out: it reads them front to back.
struct Tile {
  const uint8_t* rows;   // groups of four codes
  const uint32_t* sums;  // [rows], 128 * sum of the row, modulo 2^32
  const float* scales;   // [rows]
};

// out[row * stride + column] = float(exact sum + bias) * scale of the output * scale of the row, for all rows
// of the tile and the first `columns` outputs of the block.
using Multiply = void (*)(const Tile&, const Block&, float* out, int64_t stride, int64_t columns);

struct Path {
  Multiply multiply[kTile];  // by number of rows - 1
  int64_t code_bytes;        // of one code in a tile
  void (*lay_out)(const int8_t* rows, int64_t k, int64_t count, uint8_t* to);  // rows [count, K] -> a tile's
  int32_t (*sum)(const int8_t* row, int64_t count);
  float (*quantise)(const float* x, int64_t count, int8_t* codes);
  float (*quantise_bfloat16)(const Bfloat16* x, int64_t count, int8_t* codes);
  void (*swiglu)(float* gate, const float* up, int64_t count);
  void (*narrow)(const float* x, int64_t count, Bfloat16* to);
};

// ---------------------------------------------------------------------- elementwise, the same for all paths

INLINE void swiglu_row(float* gate, const float* up, int64_t count) {
  for (int64_t i = 0; i < count; i++) gate[i] = silu_times(gate[i], up[i]);
}

INLINE void narrow_row(const float* x, int64_t count, Bfloat16* to) {
  for (int64_t i = 0; i < count; i++) ::narrow(x[i], to + i);
}

// Returns the scale, absmax / 127. A row that is not finite gets codes 0 and a scale that is not finite.
template <class T>
INLINE float quantise_row(const T* x, int64_t count, int8_t* codes) {
  int32_t most = 0;  // absolute values compare like their bits, and NaN is the largest
  for (int64_t i = 0; i < count; i++) most = std::max(most, bits_as<int32_t>(widen(x[i])) & 0x7FFFFFFF);
  const float scale = bits_as<float>(most) / 127.0f;
  if (most >= 0x7F800000 || scale == 0.0f) {
    std::memset(codes, 0, count);
    return scale;
  }
  for (int64_t i = 0; i < count; i++) {
    const uint32_t shifted = bits_as<uint32_t>(widen(x[i]) / scale + kRounder);
    const int32_t code = static_cast<int32_t>(shifted - kRounderBits);
    // A subnormal scale is far from exact.
    codes[i] = static_cast<int8_t>(std::min(std::max(code, -127), 127));
  }
  return scale;
}

// Code: what a code is in a tile, int8_t or wider.
template <class Code>
INLINE void put_four(const int8_t* from, uint8_t* to) {
  Code codes[4];
  for (int i = 0; i < 4; i++) codes[i] = from[i];
  std::memcpy(to, codes, sizeof codes);
}

// -> [G, rows]: four codes of the first row, four of the second, ...
template <class Code>
INLINE void lay_out_rows(const int8_t* rows, int64_t k, int64_t count, uint8_t* to) {
  constexpr int64_t kFour = 4 * sizeof(Code);
  const int64_t whole = k / 4 * 4;
  for (int64_t first = 0; first < whole; first += 4)
    for (int64_t row = 0; row < count; row++, to += kFour) put_four<Code>(rows + row * k + first, to);
  std::memset(to, 0, (groups_of(k) - whole / 4) * count * kFour);
  for (int64_t row = 0; row < count && whole < k; row++) {
    int8_t last[4] = {};
    std::memcpy(last, rows + row * k + whole, k - whole);
    put_four<Code>(last, to + row * kFour);
  }
}

INLINE int32_t sum_row(const int8_t* row, int64_t count) {
  int32_t sum = 0;
  for (int64_t i = 0; i < count; i++) sum += row[i];
  return sum;
}

// ----------------------------------------------------------------------------------------- the three paths

namespace portable {

using Code = int8_t;

template <int kRows>
void multiply(const Tile& tile, const Block& block, float* out, int64_t stride, int64_t columns) {
  const auto* rows = reinterpret_cast<const int8_t*>(tile.rows);
  for (int row = 0; row < kRows; row++) {
    uint32_t sums[kOut] = {};
    for (int64_t group = 0; group < block.groups; group++) {
      const int8_t* x = rows + (group * kRows + row) * 4;
      const uint8_t* w = block.codes + group * 64;
      for (int o = 0; o < kOut; o++)
        sums[o] += static_cast<uint32_t>(w[o * 4] * x[0] + w[o * 4 + 1] * x[1] + w[o * 4 + 2] * x[2] +
                                         w[o * 4 + 3] * x[3]);
    }
    for (int64_t o = 0; o < columns; o++) {
      const uint32_t exact = sums[o] - tile.sums[row] + static_cast<uint32_t>(block.bias()[o]);
      out[row * stride + o] =
          static_cast<float>(static_cast<int32_t>(exact)) * block.scales()[o] * tile.scales[row];
    }
  }
}

void lay_out(const int8_t* rows, int64_t k, int64_t count, uint8_t* to) {
  lay_out_rows<Code>(rows, k, count, to);
}
int32_t sum(const int8_t* row, int64_t count) { return sum_row(row, count); }
float quantise(const float* x, int64_t count, int8_t* codes) { return quantise_row(x, count, codes); }
float quantise_bfloat16(const Bfloat16* x, int64_t count, int8_t* codes) {
  return quantise_row(x, count, codes);
}
void swiglu(float* gate, const float* up, int64_t count) { swiglu_row(gate, up, count); }
void narrow(const float* x, int64_t count, Bfloat16* to) { narrow_row(x, count, to); }

}  // namespace portable

#ifdef __x86_64__
namespace avx2 {

#define TARGET __attribute__((target("avx2")))

// Products are summed in pairs as int32: vpmaddubsw, which takes bytes, would saturate at int16. Rows are
// widened once for all blocks that they meet, and lie together with those that meet a block at the same time.
using Code = int16_t;
constexpr int64_t kAtOnce = 2;  // rows: as many as have their sums in registers
constexpr int64_t kGroupsAtOnce = 128;  // of a block, which stay in the first cache while all rows meet them

template <int kRows>
TARGET inline void few_rows(const int64_t* rows, const uint8_t* w, int64_t groups, __m256i (*sums)[4]) {
  __m256i pairs[kRows][4];
  for (int row = 0; row < kRows; row++)
    for (int quarter = 0; quarter < 4; quarter++) pairs[row][quarter] = sums[row][quarter];
  for (int64_t group = 0; group < groups; group++, w += 64) {
    // What one row reads only once goes past the shared cache, as in the path below.
    _mm_prefetch(reinterpret_cast<const char*>(w) + (kRows > 1 ? kPrefetchBytes : kPrefetchBytes / 8),
                 kRows > 1 ? _MM_HINT_T1 : _MM_HINT_NTA);
    __m256i x[kRows];
    for (int row = 0; row < kRows; row++) x[row] = _mm256_set1_epi64x(rows[group * kRows + row]);
#pragma GCC unroll 4
    for (int quarter = 0; quarter < 4; quarter++) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w) + quarter);
      const __m256i wide = _mm256_cvtepu8_epi16(bytes);
      for (int row = 0; row < kRows; row++)
        pairs[row][quarter] = _mm256_add_epi32(pairs[row][quarter], _mm256_madd_epi16(wide, x[row]));
    }
    // GCC would move every sum to another register, and one to memory, each time around.
    for (int row = 0; row < kRows; row++)
      for (int quarter = 0; quarter < 4; quarter++) asm("" : "+x"(pairs[row][quarter]));
  }
  for (int row = 0; row < kRows; row++)
    for (int quarter = 0; quarter < 4; quarter++) sums[row][quarter] = pairs[row][quarter];
}

TARGET inline void store_row(const Tile& tile, int row, const Block& block, const __m256i (&pairs)[4],
                             float* out, int64_t columns) {
  float whole[kOut];
  for (int half = 0; half < 2; half++) {
    const __m256i sum =
        _mm256_permute4x64_epi64(_mm256_hadd_epi32(pairs[half * 2], pairs[half * 2 + 1]), 0xD8);
    const __m256i bias = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block.bias()) + half);
    const __m256i excess = _mm256_set1_epi32(static_cast<int32_t>(tile.sums[row]));
    const __m256i exact = _mm256_add_epi32(_mm256_sub_epi32(sum, excess), bias);
    const __m256 scaled =
        _mm256_mul_ps(_mm256_cvtepi32_ps(exact), _mm256_loadu_ps(block.scales() + half * 8));
    _mm256_storeu_ps(whole + half * 8, _mm256_mul_ps(scaled, _mm256_set1_ps(tile.scales[row])));
  }
  std::memcpy(out, whole, columns * sizeof(float));
}

template <int kRows>
TARGET void multiply(const Tile& tile, const Block& block, float* out, int64_t stride, int64_t columns) {
  const auto* rows = reinterpret_cast<const int64_t*>(tile.rows);
  __m256i sums[kRows][4];
  for (auto& row : sums)
    for (__m256i& quarter : row) quarter = _mm256_setzero_si256();
  for (int64_t group = 0; group < block.groups; group += kGroupsAtOnce) {
    const int64_t groups = std::min(kGroupsAtOnce, block.groups - group);
    const uint8_t* w = block.codes + group * 64;
    int row = 0;
    for (; row + kAtOnce <= kRows; row += kAtOnce)
      few_rows<kAtOnce>(rows + row * block.groups + group * kAtOnce, w, groups, sums + row);
    if (row < kRows) few_rows<1>(rows + row * block.groups + group, w, groups, sums + row);
  }
  for (int row = 0; row < kRows; row++) store_row(tile, row, block, sums[row], out + row * stride, columns);
}

TARGET void lay_out(const int8_t* rows, int64_t k, int64_t count, uint8_t* to) {
  for (int64_t row = 0; row < count; row += kAtOnce)
    lay_out_rows<Code>(rows + row * k, k, std::min(kAtOnce, count - row),
                       to + row * groups_of(k) * 4 * sizeof(Code));
}
TARGET int32_t sum(const int8_t* row, int64_t count) { return sum_row(row, count); }
TARGET float quantise(const float* x, int64_t count, int8_t* codes) { return quantise_row(x, count, codes); }
TARGET float quantise_bfloat16(const Bfloat16* x, int64_t count, int8_t* codes) {
  return quantise_row(x, count, codes);
}
TARGET void swiglu(float* gate, const float* up, int64_t count) { swiglu_row(gate, up, count); }
TARGET void narrow(const float* x, int64_t count, Bfloat16* to) { narrow_row(x, count, to); }

#undef TARGET

}  // namespace avx2

namespace avx512 {

#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))

using Code = int8_t;

// sum += weights * the four codes at x. As an intrinsic it would be two instructions, and GCC copies every sum
// twice on the way around the loop.
TARGET INLINE void accumulate(__m512i& sum, const __m512i& weights, const int32_t* x) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(weights), "m"(*x));
}

template <int kRows>
TARGET void multiply(const Tile& tile, const Block& block, float* out, int64_t stride, int64_t columns) {
  // An instruction takes about four cycles to give its sum: few rows need several sums each.
  constexpr int kStep = kRows <= 2 ? 4 : kRows <= 4 ? 2 : 1;
  __m512i sums[kStep][kRows];
  for (int step = 0; step < kStep; step++)
    for (int row = 0; row < kRows; row++) sums[step][row] = _mm512_setzero_si512();
  const auto* x = reinterpret_cast<const int32_t*>(tile.rows);
  for (int64_t group = 0; group < block.groups; group += kStep) {
#pragma GCC unroll 4
    for (int step = 0; step < kStep; step++) {
      const uint8_t* w = block.codes + (group + step) * 64;
      _mm_prefetch(reinterpret_cast<const char*>(w) + (kRows > 4 ? kPrefetchBytes : kPrefetchBytes / 2),
                   kRows < kRowsOfHalfTile ? _MM_HINT_NTA : _MM_HINT_T1);
      const __m512i weights = _mm512_loadu_si512(w);
#pragma GCC unroll 16
      for (int row = 0; row < kRows; row++) accumulate(sums[step][row], weights, x++);
    }
  }
  const __mmask16 mask = static_cast<__mmask16>((1u << columns) - 1);
  const __m512 by_output = _mm512_loadu_ps(block.scales());
  const __m512i bias = _mm512_loadu_si512(block.bias());
#pragma GCC unroll 16
  for (int row = 0; row < kRows; row++) {
    __m512i sum = sums[0][row];
    for (int step = 1; step < kStep; step++) sum = _mm512_add_epi32(sum, sums[step][row]);
    sum = _mm512_sub_epi32(sum, _mm512_set1_epi32(static_cast<int32_t>(tile.sums[row])));
    sum = _mm512_add_epi32(sum, bias);
    const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), by_output);
    _mm512_mask_storeu_ps(out + row * stride, mask, _mm512_mul_ps(scaled, _mm512_set1_ps(tile.scales[row])));
  }
}

TARGET void lay_out(const int8_t* rows, int64_t k, int64_t count, uint8_t* to) {
  lay_out_rows<Code>(rows, k, count, to);
}
TARGET int32_t sum(const int8_t* row, int64_t count) { return sum_row(row, count); }
TARGET float quantise(const float* x, int64_t count, int8_t* codes) { return quantise_row(x, count, codes); }
TARGET float quantise_bfloat16(const Bfloat16* x, int64_t count, int8_t* codes) {
  return quantise_row(x, count, codes);
}
TARGET void swiglu(float* gate, const float* up, int64_t count) { swiglu_row(gate, up, count); }
TARGET void narrow(const float* x, int64_t count, Bfloat16* to) { narrow_row(x, count, to); }

#undef TARGET

}  // namespace avx512
#endif

#define PATH(space)                                                                    \
  Path {                                                                               \
    {space::multiply<kIndex + 1>...}, sizeof(space::Code), space::lay_out, space::sum, \
        space::quantise, space::quantise_bfloat16, space::swiglu, space::narrow        \
  }

template <int... kIndex>
inline const Path& path_of(int path, std::integer_sequence<int, kIndex...>) {
#ifdef __x86_64__
  static const Path paths[] = {PATH(portable), PATH(avx2), PATH(avx512)};
#else
  static const Path paths[] = {PATH(portable)};
#endif
  return paths[path];
}

inline const Path& path_of(int path) { return path_of(path, std::make_integer_sequence<int, kTile>{}); }

#undef PATH

}  // namespace int8
