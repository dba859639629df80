// Products of few rows with a weight that comes from memory: a part of float_paths.h, which includes it once
// for each path. No include guard, as there.
//
// Memory gives up to twice as much where it is read in order, and asked for some kilobytes ahead. So all rows
// meet a line, or a few of them, before the next one is read. Additions have the order that they have in dots
// and blend.

// Calls of() with the number of rows as a constant.
template <int kRows = kManyRows - 1, class Of>
INLINE void with_rows(int64_t rows, const Of& of) {
  if (rows == kRows) return of(std::integral_constant<int, kRows>{});
  if constexpr (kRows > 1) with_rows<kRows - 1>(rows, of);
}

// Asks for what is read when the stream is kAhead further, past the outer caches: they keep what is read
// again.
template <int kCount, class B>
INLINE void fetch_ahead(const B* from) {
  const char* ahead = reinterpret_cast<const char*>(from) + kAhead;
#pragma GCC unroll 8
  for (size_t i = 0; i < kCount * sizeof(B); i += kCacheLine) __builtin_prefetch(ahead + i, 0, 0);
}

template <int kRows, int kColumns, class B>
INLINE void stream_columns(const float* a, int64_t a_stride, const B* b, int64_t b_stride, int64_t size,
                           float* out, int64_t out_stride) {
  Lanes sums[kRows][kColumns] = {}, right[kColumns];
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    fetch_ahead<kColumns * kLanes>(b + i * kColumns);
    for (int column = 0; column < kColumns; column++) right[column] = load(b + column * b_stride + i);
#pragma GCC unroll 8
    for (int row = 0; row < kRows; row++) {
      const Lanes left = load(a + row * a_stride + i);
#pragma GCC unroll 8
      for (int column = 0; column < kColumns; column++)
        sums[row][column] = fused(left, right[column], sums[row][column]);
    }
  }
  if (i < size) {
    for (int column = 0; column < kColumns; column++)
      right[column] = load_some(b + column * b_stride + i, size - i);
    for (int row = 0; row < kRows; row++) {
      const Lanes left = load_some(a + row * a_stride + i, size - i);
      for (int column = 0; column < kColumns; column++)
        sums[row][column] = fused(left, right[column], sums[row][column]);
    }
  }
  for (int row = 0; row < kRows; row++)
    for (int column = 0; column < kColumns; column++)
      out[row * out_stride + column] = total(sums[row][column]);
}

template <int kRows, class B>
INLINE void stream_dots(const float* a, int64_t a_stride, const B* b, int64_t b_stride, int64_t columns,
                        int64_t size, float* out, int64_t out_stride) {
  int64_t column = 0;
  for (; column + kStreamColumns <= columns; column += kStreamColumns)
    stream_columns<kRows, kStreamColumns>(a, a_stride, b + column * b_stride, b_stride, size, out + column,
                                          out_stride);
  for (; column < columns; column++)
    stream_columns<kRows, 1>(a, a_stride, b + column * b_stride, b_stride, size, out + column, out_stride);
}

// out[row] += a[row][i] * b[i], for kCount lines i one after another.
template <int kRows, int kCount, class B>
INLINE void stream_lines(const float* a, int64_t a_stride, const B* b, int64_t b_stride, int64_t columns,
                         float* out, int64_t out_stride) {
  Lanes left[kRows][kCount];
#pragma GCC unroll 8
  for (int row = 0; row < kRows; row++)
#pragma GCC unroll 8
    for (int line = 0; line < kCount; line++) left[row][line] = spread(a[row * a_stride + line]);
  Lanes sums[kRows];
  int64_t column = 0;
  for (; column + kLanes <= columns; column += kLanes) {
    fetch_ahead<kCount * kLanes>(b + column * kCount);
    for (int row = 0; row < kRows; row++) sums[row] = load(out + row * out_stride + column);
#pragma GCC unroll 8
    for (int line = 0; line < kCount; line++) {
      const Lanes right = load(b + line * b_stride + column);
#pragma GCC unroll 8
      for (int row = 0; row < kRows; row++) sums[row] = fused(left[row][line], right, sums[row]);
    }
    for (int row = 0; row < kRows; row++) store(sums[row], out + row * out_stride + column);
  }
  if (column == columns) return;
  const int64_t count = columns - column;
  for (int row = 0; row < kRows; row++) sums[row] = load_some(out + row * out_stride + column, count);
  for (int line = 0; line < kCount; line++) {
    const Lanes right = load_some(b + line * b_stride + column, count);
    for (int row = 0; row < kRows; row++) sums[row] = fused(left[row][line], right, sums[row]);
  }
  for (int row = 0; row < kRows; row++) store_some(sums[row], count, out + row * out_stride + column);
}

// The sums lie in the first cache: from registers, the weight would be read by columns.
template <int kRows, class B>
INLINE void stream_blend(const float* a, int64_t a_stride, const B* b, int64_t b_stride, int64_t columns,
                         int64_t size, float* out, int64_t out_stride) {
  for (int row = 0; row < kRows; row++) std::memset(out + row * out_stride, 0, columns * sizeof(float));
  int64_t i = 0;
  for (; i + kStreamLines <= size; i += kStreamLines)
    stream_lines<kRows, kStreamLines>(a + i, a_stride, b + i * b_stride, b_stride, columns, out, out_stride);
  for (; i < size; i++)
    stream_lines<kRows, 1>(a + i, a_stride, b + i * b_stride, b_stride, columns, out, out_stride);
}

// As widen_row, of a weight's line.
template <class T>
INLINE void stream_row(const T* x, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += kLanes) fetch_ahead<kLanes>(x + i);
  widen_row(x, count, to);
}
