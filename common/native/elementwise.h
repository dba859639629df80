// Elementwise functions that all kernels share. Each float operation is a single IEEE operation in a fixed
// order: compiled with -ffp-contract=off they give the same bits on every processor. Where a multiplication and
// an addition are fused, the source says so.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#define INLINE inline __attribute__((always_inline))

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class To, class From>
INLINE To bits_as(From from) {
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

struct Bfloat16 {
  uint16_t bits;
};

INLINE float widen(float x) { return x; }
INLINE float widen(Bfloat16 x) { return bits_as<float>(static_cast<uint32_t>(x.bits) << 16); }

// Rounds to the nearest, ties to even; NaN stays NaN.
INLINE void narrow(float x, float* to) { *to = x; }
INLINE void narrow(float x, Bfloat16* to) {
  const uint32_t bits = bits_as<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  to->bits = static_cast<uint16_t>(x == x ? rounded : 0x7FC0);
}

// Adding it rounds a small float to an integer, ties to even, and leaves that integer in the lowest bits.
constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23
constexpr uint32_t kRounderBits = 0x4B400000;

// e^x = 2^k * e^r. k ln 2 is taken off in two parts, the first of them exact; e^r is Taylor's series to r^7.
INLINE float exponential(float x) {
  x = x < -104.0f ? -104.0f : x;
  x = x > 89.5f ? 89.5f : x;  // both ends lie where the result is 0 or infinite
  const float shifted = x * 1.44269504f + kRounder;
  const float k = shifted - kRounder;
  const float r = x - k * 0.693359375f - k * -2.12194440e-4f;
  float sum = 1.0f / 5040;
  sum = sum * r + 1.0f / 720;
  sum = sum * r + 1.0f / 120;
  sum = sum * r + 1.0f / 24;
  sum = sum * r + 1.0f / 6;
  sum = sum * r + 0.5f;
  sum = sum * r + 1.0f;
  sum = sum * r + 1.0f;
  // Two factors, since 2^k alone may be no float.
  const int32_t power = static_cast<int32_t>(bits_as<uint32_t>(shifted) - kRounderBits);
  const int32_t half = power >> 1;
  const uint32_t rest = static_cast<uint32_t>(power) - static_cast<uint32_t>(half);
  return sum * bits_as<float>((static_cast<uint32_t>(half) + 127) << 23) * bits_as<float>((rest + 127) << 23);
}

INLINE float silu_times(float gate, float up) { return gate / (1.0f + exponential(-gate)) * up; }
