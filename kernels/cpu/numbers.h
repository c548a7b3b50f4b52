// Vectors of float32, and numbers of other types widened to it.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace ottfx {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));

inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float from_half(uint16_t half) {
  const uint32_t magnitude = uint32_t(half & 0x7fff) << 13, sign = uint32_t(half & 0x8000) << 16;
  // Of a finite number the exponent is too small by 112, of infinity and NaN it has to be all ones.
  const float finite = from_bits(magnitude) * 0x1p112f;
  const float x = magnitude >= 0x0f800000 ? from_bits(magnitude | 0x7f800000) : finite;
  return sign ? -x : x;
}

struct Half {
  uint16_t bits;
  operator float() const { return from_half(bits); }
};

struct BFloat {
  uint16_t bits;
  operator float() const { return from_bits(uint32_t(bits) << 16); }
};

template <class T>
void widen(const void* from, int64_t first, int64_t count, float* to) {
  const T* source = static_cast<const T*>(from) + first;
  for (int64_t i = 0; i < count; ++i) to[i] = float(source[i]);
}

template <class V, class T>
inline V load(const T* from) {
  V vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

template <class V, class T>
inline void store(V vector, T* to) {
  std::memcpy(to, &vector, sizeof vector);
}

inline Floats all(float x) { return x - Floats{}; }

inline float sum_of(Floats x) {
  float sum = 0.0f;
  for (int lane = 0; lane < kLanes; ++lane) sum += x[lane];
  return sum;
}

// Of `count` elements, a multiple of 16.
inline float dot(const float* x, const float* y, int64_t count) {
  Floats sum{};
  for (int64_t i = 0; i < count; i += kLanes) sum += load<Floats>(x + i) * load<Floats>(y + i);
  return sum_of(sum);
}

// exp(x) of x <= 0 to a few units of the last place, 0 below -87: range reduction by ln 2, then Taylor's series of
// what is left, at most ln(2) / 2.
inline Floats exponential(Floats x) {
  const Floats bounded = x < all(-87.0f) ? all(-87.0f) : x;
  const Ints power = __builtin_convertvector(bounded * 1.44269504f - 0.5f, Ints);  // towards 0: to the nearest
  const Floats n = __builtin_convertvector(power, Floats);
  const Floats r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats series = all(1.0f / 5040);
  for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) series = series * r + c;
  const Ints two_to_the_power = (power + 127) << 23;
  return x < all(-87.0f) ? Floats{} : series * load<Floats>(&two_to_the_power);
}

}  // namespace ottfx
