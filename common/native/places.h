// One order of numbers and where they stand, as integers: NaN before every number, and of equal ones the first.
#pragma once
#include "elementwise.h"

// Larger for a larger number, and of equal ones for the lower index, which has 32 bits. Never 0.
INLINE uint64_t place_of(float number, int64_t index) {
  const uint32_t bits = bits_as<uint32_t>(number + 0.0f);  // -0 becomes 0
  // Not by branches: of corrected scores half may be negative.
  const uint32_t is_negative = bits >> 31, is_nan = number != number;
  const uint32_t ascending = (bits ^ ((0 - is_negative) | 1u << 31)) | (0 - is_nan);
  return static_cast<uint64_t>(ascending) << 32 | ~static_cast<uint32_t>(index);
}

INLINE int64_t index_of(uint64_t place) { return ~static_cast<uint32_t>(place); }
