// The arithmetic of bf16.cpp, with AVX-512 BF16: rows times weights that lie as they do in a checkpoint.
//
// One order of additions for all numbers of rows. Of the K products of an output, lane j of four adds those of
// the elements 8g + 2j and 8g + 2j + 1, for g = 0, 1, ...; then the lanes are added as (0 + 1) + (2 + 3). A
// register holds four lanes of four outputs, so that weights need only be turned in parts of 128 bits.
// vdpbf16ps takes subnormal numbers for 0, and so are they written here: by no more than 2^-126 off.
//
// Shapes: K in-features, padded to whole registers, N out-features, G = K / 8.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <utility>

#include "elementwise.h"

namespace bf16 {

#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))

constexpr int64_t kGranule = 8;      // elements of a lane of every output: 128 bits
constexpr int64_t kStep = 32;        // elements of a register
constexpr int64_t kColumns = 16;     // outputs of a panel
constexpr int64_t kSomeColumns = 8;  // outputs whose sums stay in registers where rows are few
constexpr int64_t kFew = 10;         // most rows that meet weights where they lie
constexpr int64_t kTile = 6;         // most rows that meet a panel at once: 24 sums
// How far ahead of its use a weight is fetched, in elements: from memory, and a panel from the second cache.
constexpr int64_t kAhead = 512;
constexpr int64_t kPanelAhead = 1024;

struct alignas(64) Line {
  Bfloat16 elements[kStep];
};

// Some outputs' weights, each of K elements.
struct Rows {
  const Bfloat16* from;
  int64_t stride;
};

// What a product fetches meanwhile from memory, one line for every granule; step 0 fetches nothing new.
struct Ahead {
  const char* from;
  int64_t step;
};

// A tile of rows is [G, rows, 8]: the products read it front to back.
using MultiplyFew = void (*)(const Bfloat16* tile, const Rows& weights, int64_t k, Line* out);
using MultiplyMany = void (*)(const Bfloat16* tile, const Line* panel, int64_t k, Ahead ahead, Line* out);

TARGET INLINE __m512 add_products(__m512 sums, __m512i weights, __m512i x) {
  return _mm512_dpbf16_ps(sums, (__m512bh)weights, (__m512bh)x);
}

// A granule of a row, for all outputs of a register.
TARGET INLINE __m512i granule_of(const Bfloat16* x) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}

// Four granules of each of four outputs -> granule i of all four outputs, for each i.
TARGET INLINE void turn(__m512i (&w)[4]) {
  const __m512i low01 = _mm512_shuffle_i64x2(w[0], w[1], 0x44),
                low23 = _mm512_shuffle_i64x2(w[2], w[3], 0x44);
  const __m512i high01 = _mm512_shuffle_i64x2(w[0], w[1], 0xEE);
  const __m512i high23 = _mm512_shuffle_i64x2(w[2], w[3], 0xEE);
  w[0] = _mm512_shuffle_i64x2(low01, low23, 0x88);
  w[1] = _mm512_shuffle_i64x2(low01, low23, 0xDD);
  w[2] = _mm512_shuffle_i64x2(high01, high23, 0x88);
  w[3] = _mm512_shuffle_i64x2(high01, high23, 0xDD);
}

// Adds the lanes of sixteen outputs, four in each register.
TARGET INLINE __m512 total(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab01 = _mm512_unpacklo_ps(a, b), ab23 = _mm512_unpackhi_ps(a, b);
  const __m512 cd01 = _mm512_unpacklo_ps(c, d), cd23 = _mm512_unpackhi_ps(c, d);
  const __m512 first =
      _mm512_add_ps(_mm512_shuffle_ps(ab01, cd01, 0x44), _mm512_shuffle_ps(ab01, cd01, 0xEE));
  const __m512 last = _mm512_add_ps(_mm512_shuffle_ps(ab23, cd23, 0x44), _mm512_shuffle_ps(ab23, cd23, 0xEE));
  const __m512i in_order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_ps(in_order, _mm512_add_ps(first, last));
}

// Rounds as narrow() does, which vcvtneps2bf16 does not: it takes subnormal numbers for 0.
TARGET INLINE __m256i narrowed(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(_mm512_set1_epi32(0x7FFF), odd));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i high = _mm512_srli_epi32(rounded, 16);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(high, is_nan, _mm512_set1_epi32(0x7FC0)));
}

// Sixteen outputs, eight at a time: weights [16, K] -> out[row], whose first sixteen elements are written.
// Eight are eight streams of memory; where they end, the next eight begin.
template <int kRows>
TARGET void multiply_few(const Bfloat16* tile, const Rows& weights, int64_t k, Line* out) {
  constexpr int kGroups = kSomeColumns / 4;
  for (int64_t column = 0; column < kColumns; column += kSomeColumns) {
    __m512 sums[kGroups][kRows];
#pragma GCC unroll 2
    for (int group = 0; group < kGroups; group++)
#pragma GCC unroll 10
      for (int row = 0; row < kRows; row++) sums[group][row] = _mm512_setzero_ps();
    const Bfloat16* from = weights.from + column * weights.stride;
    const Bfloat16* x = tile;
    for (int64_t i = 0; i < k; i += kStep, from += kStep, x += kRows * kStep) {
      const int64_t ahead = i + kAhead < k ? kAhead : kSomeColumns * weights.stride - k + kAhead;
      __m512i w[kGroups][4];
#pragma GCC unroll 2
      for (int group = 0; group < kGroups; group++) {
#pragma GCC unroll 4
        for (int o = 0; o < 4; o++) {
          const Bfloat16* at = from + (group * 4 + o) * weights.stride;
          _mm_prefetch(reinterpret_cast<const char*>(at + ahead), _MM_HINT_T1);
          w[group][o] = _mm512_loadu_si512(at);
        }
        turn(w[group]);
      }
#pragma GCC unroll 4
      for (int granule = 0; granule < 4; granule++)
#pragma GCC unroll 10
        for (int row = 0; row < kRows; row++) {
          const __m512i own = granule_of(x + (granule * kRows + row) * kGranule);
#pragma GCC unroll 2
          for (int group = 0; group < kGroups; group++)
            sums[group][row] = add_products(sums[group][row], w[group][granule], own);
        }
    }
#pragma GCC unroll 10
    for (int row = 0; row < kRows; row++) {
      const __m512 none = _mm512_setzero_ps();
      const __m256i eight = narrowed(total(sums[0][row], sums[1][row], none, none));
      _mm_store_si128(reinterpret_cast<__m128i*>(out[row].elements + column), _mm256_castsi256_si128(eight));
    }
  }
}

// weights [16, K] -> panel [G, 4 registers], each of a granule of four outputs.
TARGET inline void lay_out_panel(const Rows& weights, int64_t k, Line* panel) {
  for (int64_t i = 0; i < k; i += kStep, panel += kColumns)
#pragma GCC unroll 4
    for (int group = 0; group < 4; group++) {
      __m512i w[4];
#pragma GCC unroll 4
      for (int o = 0; o < 4; o++)
        w[o] = _mm512_loadu_si512(weights.from + (group * 4 + o) * weights.stride + i);
      turn(w);
#pragma GCC unroll 4
      for (int granule = 0; granule < 4; granule++)
        _mm512_store_si512(panel + granule * 4 + group, w[granule]);
    }
}

// panel -> out[row], whose first sixteen elements are written.
template <int kRows>
TARGET void multiply_many(const Bfloat16* tile, const Line* panel, int64_t k, Ahead ahead, Line* out) {
  __m512 sums[kRows][4];
#pragma GCC unroll 6
  for (int row = 0; row < kRows; row++)
#pragma GCC unroll 4
    for (int group = 0; group < 4; group++) sums[row][group] = _mm512_setzero_ps();
  for (int64_t i = 0; i < k; i += kGranule, panel += 4, tile += kRows * kGranule, ahead.from += ahead.step) {
    _mm_prefetch(ahead.from, _MM_HINT_T1);
    __m512i w[4];
#pragma GCC unroll 4
    for (int group = 0; group < 4; group++) {
      _mm_prefetch(reinterpret_cast<const char*>(panel[group].elements + kPanelAhead), _MM_HINT_T0);
      w[group] = _mm512_load_si512(panel + group);
    }
#pragma GCC unroll 6
    for (int row = 0; row < kRows; row++) {
      const __m512i own = granule_of(tile + row * kGranule);
#pragma GCC unroll 4
      for (int group = 0; group < 4; group++)
        sums[row][group] = add_products(sums[row][group], w[group], own);
    }
  }
#pragma GCC unroll 6
  for (int row = 0; row < kRows; row++)
    _mm256_store_si256(reinterpret_cast<__m256i*>(out[row].elements),
                       narrowed(total(sums[row][0], sums[row][1], sums[row][2], sums[row][3])));
}

TARGET inline void swiglu(const Bfloat16* gate, const Bfloat16* up, Bfloat16* to) {
  for (int64_t i = 0; i < kColumns; i++) narrow(silu_times(widen(gate[i]), widen(up[i])), to + i);
}

#undef TARGET

template <int... kIndex>
inline MultiplyFew few(int64_t rows, std::integer_sequence<int, kIndex...>) {
  static constexpr MultiplyFew all[] = {multiply_few<kIndex + 1>...};
  return all[rows - 1];
}

template <int... kIndex>
inline MultiplyMany many(int64_t rows, std::integer_sequence<int, kIndex...>) {
  static constexpr MultiplyMany all[] = {multiply_many<kIndex + 1>...};
  return all[rows - 1];
}

}  // namespace bf16
