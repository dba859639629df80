// Sixteen floats side by side, and how many of them a tile holds: a part of float_paths.h, which includes it
// once for each path. No include guard, as there.

using Eight = float __attribute__((vector_size(32)));
using Four = float __attribute__((vector_size(16)));

#if FUSED_LANES == 8
// Two registers by name: a vector wider than the registers stays in memory, GCC moves it about by halves of
// these, and every product waits for what the one before it has stored.
struct Lanes {
  __m256 low, high;
};

// Eight registers of sums: as many products as are under way at once, of the sixteen registers there are.
constexpr int kDotsRows = 2, kDotsColumns = 2, kBlendRows = 4, kBlendVectors = 1, kOfOneRow = 4;
constexpr int kStreamColumns = 1, kStreamLines = 8;

INLINE Lanes operator+(const Lanes& a, const Lanes& b) { return {a.low + b.low, a.high + b.high}; }
INLINE Lanes operator*(const Lanes& a, const Lanes& b) { return {a.low * b.low, a.high * b.high}; }

INLINE __m256 load_eight(const Bfloat16* from) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

INLINE Lanes load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
INLINE Lanes load(const Bfloat16* from) { return {load_eight(from), load_eight(from + 8)}; }

INLINE void store(const Lanes& lanes, float* to) {
  _mm256_storeu_ps(to, lanes.low);
  _mm256_storeu_ps(to + 8, lanes.high);
}

INLINE Lanes spread(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }

// a * b + c, rounded once: one IEEE operation, which the compiler must not make of two by itself.
INLINE Lanes fused(const Lanes& a, const Lanes& b, const Lanes& c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}

INLINE Eight added_halves(const Lanes& lanes) { return lanes.low + lanes.high; }
#else
using Lanes = float __attribute__((vector_size(64)));
using Words = uint32_t __attribute__((vector_size(64)));
using Halves = uint16_t __attribute__((vector_size(32)));

#if FUSED_LANES == 16
constexpr int kDotsRows = 4, kDotsColumns = 4, kBlendRows = 4, kBlendVectors = 4, kOfOneRow = 4;
constexpr int kStreamColumns = 4, kStreamLines = 8;
#else  // larger tiles are not faster without such registers, and take the compiler a minute
constexpr int kDotsRows = 2, kDotsColumns = 1, kBlendRows = 2, kBlendVectors = 1, kOfOneRow = 1;
constexpr int kStreamColumns = 1, kStreamLines = 1;
#endif

INLINE Lanes load(const float* from) {
  Lanes lanes;
  std::memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

INLINE Lanes load(const Bfloat16* from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  return bits_as<Lanes>(__builtin_convertvector(halves, Words) << 16);
}

INLINE void store(const Lanes& lanes, float* to) { std::memcpy(to, &lanes, sizeof lanes); }

INLINE Lanes spread(float x) { return Lanes{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }

// a * b + c, rounded once: one IEEE operation, which the compiler must not make of two by itself.
INLINE Lanes fused(const Lanes& a, const Lanes& b, const Lanes& c) {
#if FUSED_LANES == 16
  return (Lanes)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
  Lanes lanes;
  for (int i = 0; i < kLanes; i++) lanes[i] = std::fma(a[i], b[i], c[i]);
  return lanes;
#endif
}

INLINE Eight added_halves(const Lanes& lanes) {
  Eight halves[2];
  std::memcpy(halves, &lanes, sizeof lanes);
  return halves[0] + halves[1];
}
#endif

INLINE float total(const Lanes& lanes) {
  const Eight eight = added_halves(lanes);
  Four halves[2];
  std::memcpy(halves, &eight, sizeof eight);
  const Four four = halves[0] + halves[1];
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// The first `count` lanes; 0 in the others.
template <class T>
INLINE Lanes load_some(const T* from, int64_t count) {
  T whole[kLanes] = {};
  std::memcpy(whole, from, count * sizeof(T));
  return load(whole);
}

INLINE void store_some(const Lanes& lanes, int64_t count, float* to) {
  float whole[kLanes];
  store(lanes, whole);
  std::memcpy(to, whole, count * sizeof(float));
}
