// Where the greatest number of each row of logits is, and whether it is one: torch.argmax, in pieces of rows
// that threads share. A vocabulary is long, and a decode step may have no more than one row of it.
//
// A C ABI without torch. `path` is one that int8_best_path() allows. NaN comes before every number, -0 equals 0,
// and of equal ones the first is taken, on every path and at every number of threads. Numbers are compared as
// the integers that their bits are, since the compiler makes vectors of the greatest of integers by itself.
//
// Shapes: B rows, V numbers of a row.
#include <limits>
#include <new>
#include <vector>

#include "elementwise.h"
#include "places.h"
#include "threads.h"

namespace argmax {

constexpr int64_t kPiece = 1 << 13;         // numbers of one task
constexpr int64_t kBlock = 1 << 10;         // numbers that are looked through again, for the greatest of them
constexpr int64_t kLeastNumbers = 1 << 15;  // numbers that are worth waking another thread for

template <class T>
struct Bits;

template <>
struct Bits<float> {
  using Integer = int32_t;
  static constexpr Integer kInfinity = 0x7F800000;
};

template <>
struct Bits<Bfloat16> {
  using Integer = int16_t;
  static constexpr Integer kInfinity = 0x7F80;
};

template <class T>
using Integer = typename Bits<T>::Integer;

// Without its sign: beyond infinity's for NaN.
template <class T>
INLINE Integer<T> magnitude_of(T x) {
  return static_cast<Integer<T>>(bits_as<Integer<T>>(x) & std::numeric_limits<Integer<T>>::max());
}

// Ascends with the numbers; -0 and 0 have the same.
template <class T>
INLINE Integer<T> rank_of(T x) {
  const auto sign = static_cast<Integer<T>>(bits_as<Integer<T>>(x) >> (8 * sizeof(T) - 1));  // 0 or -1
  return static_cast<Integer<T>>((magnitude_of(x) ^ sign) - sign);
}

template <class T>
bool is_finite(T x) {
  return magnitude_of(x) < Bits<T>::kInfinity;
}

// The place of the greatest among those of a row from `first` on to before `end`.
template <class T>
INLINE uint64_t greatest(const T* row, int64_t first, int64_t end) {
  auto highest = std::numeric_limits<Integer<T>>::min();  // below every rank
  int64_t found = first;
  for (int64_t block = first; block < end; block += kBlock) {
    const int64_t block_end = std::min(block + kBlock, end);
    auto rank = std::numeric_limits<Integer<T>>::min();
    Integer<T> magnitude = 0;
    for (int64_t i = block; i < block_end; i++) {
      rank = std::max(rank, rank_of(row[i]));
      magnitude = std::max(magnitude, magnitude_of(row[i]));
    }
    if (magnitude > Bits<T>::kInfinity) {
      while (magnitude_of(row[block]) <= Bits<T>::kInfinity) block++;
      return place_of(widen(row[block]), block);
    }
    if (rank > highest) {
      highest = rank;
      found = block;
    }
  }
  while (rank_of(row[found]) != highest) found++;
  return place_of(widen(row[found]), found);
}

template <class T>
using Greatest = uint64_t(const T* row, int64_t first, int64_t end);

template <class T>
uint64_t greatest_portable(const T* row, int64_t first, int64_t end) {
  return greatest(row, first, end);
}

#ifdef __x86_64__
// Without it a vector is half as wide, and there is no greatest of 32-bit integers in one instruction.
template <class T>
__attribute__((target("avx2"))) uint64_t greatest_avx2(const T* row, int64_t first, int64_t end) {
  return greatest(row, first, end);
}
#else
template <class T>
constexpr Greatest<T>* greatest_avx2 = greatest_portable<T>;
#endif

template <class T>
void find(int path, int threads, const T* x, int64_t rows, int64_t size, int64_t stride, int64_t* ids,
          bool* finite) {
  Greatest<T>* const greatest_on_path = path >= 1 ? greatest_avx2<T> : greatest_portable<T>;
  const int64_t pieces = ceil_div(size, kPiece);
  std::vector<uint64_t> places(rows * pieces);
  for_each(rows * size < kLeastNumbers ? 1 : threads, rows * pieces, [&](int64_t task) {
    const int64_t row = task / pieces, first = task % pieces * kPiece;
    places[task] = greatest_on_path(x + row * stride, first, std::min(first + kPiece, size));
  });
  for (int64_t row = 0; row < rows; row++) {
    const uint64_t* own = places.data() + row * pieces;
    ids[row] = index_of(*std::max_element(own, own + pieces));
    finite[row] = is_finite(x[row * stride + ids[row]]);
  }
}

}  // namespace argmax

using namespace argmax;

#define EXPORT __attribute__((visibility("default")))

extern "C" {

// x [B, V], float or bfloat16, rows `stride` numbers apart, V from 1 to 2^32 -> ids [B], and whether that
// number is finite, [B]: it is not where any of the row is NaN or inf, or all are -inf. Returns 0, or 1
// without memory.
EXPORT int argmax_of_rows(int path, int threads, int is_bfloat16, const void* x, int64_t rows, int64_t size,
                          int64_t stride, int64_t* ids, bool* finite) try {
  if (is_bfloat16)
    find(path, threads, static_cast<const Bfloat16*>(x), rows, size, stride, ids, finite);
  else
    find(path, threads, static_cast<const float*>(x), rows, size, stride, ids, finite);
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}

}  // extern "C"
