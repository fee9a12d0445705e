// Vectors of KVC_WIDTH floats in GCC's and Clang's own vector types: what they become is decided by
// the instruction set that a file is compiled for.
//
// All functions are static, so that no two object files for different instruction sets share one.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace {

constexpr int WIDTH = KVC_WIDTH;

typedef float Floats __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t Words __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH)));

inline Floats load(const float* from) {
  Floats out;
  __builtin_memcpy(&out, from, sizeof(out));
  return out;
}

inline void store(float* to, Floats values) {
  __builtin_memcpy(to, &values, sizeof(values));
}

inline Floats splat(float value) {
  Floats out;
  for (int i = 0; i < WIDTH; ++i) out[i] = value;
  return out;
}

inline Floats maximum(Floats a, Floats b) {
  return a > b ? a : b;
}

inline float maximum(float a, float b) {
  return a > b ? a : b;
}

inline Floats as_floats(Words bits) {
  return reinterpret_cast<Floats>(bits);
}

// In a fixed order: halves, quarters and so on.
inline float sum_of(Floats values) {
  for (int half = WIDTH / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) values[i] += values[i + half];
  }
  return values[0];
}

inline float maximum_of(Floats values) {
  float best = values[0];
  for (int i = 1; i < WIDTH; ++i) best = maximum(best, values[i]);
  return best;
}

inline Words load_words(const uint16_t* from) {
  Halves halves;
  __builtin_memcpy(&halves, from, sizeof(halves));
  return __builtin_convertvector(halves, Words);
}

// A stored element type: its numbers one by one and by vectors, as float32.
struct Float32 {
  using Stored = float;
  static float one(const float* from) { return *from; }
  static Floats many(const float* from) { return load(from); }
};

struct BFloat16 {
  using Stored = uint16_t;
  static float one(const uint16_t* from) {
    const uint32_t bits = static_cast<uint32_t>(*from) << 16;
    float out;
    __builtin_memcpy(&out, &bits, sizeof(out));
    return out;
  }
  static Floats many(const uint16_t* from) { return as_floats(load_words(from) << 16); }
};

struct Float16 {
  using Stored = uint16_t;
  static float one(const uint16_t* from) {
    uint16_t copies[WIDTH] = {*from};
    return many(copies)[0];
  }
  static Floats many(const uint16_t* from) {
    const Words bits = load_words(from);
    // Exponents start 112 lower in float32; the product is exact, denormals included.
    const Floats finite = as_floats((bits & 0x7fff) << 13) * 0x1p112f;
    const Words special = ((bits & 0x7fff) << 13) | 0x7f800000;
    const Floats size = (bits & 0x7c00) == 0x7c00 ? as_floats(special) : finite;
    return as_floats(reinterpret_cast<Words>(size) | ((bits & 0x8000) << 16));
  }
};

// e^x for x <= 88, to about one unit in the last place; 0 below -87.
inline Floats exp_of(Floats x) {
  const Floats inside = maximum(x, splat(-88.0f));
  // Adding and taking away 1.5 * 2^23 leaves the nearest whole number.
  const Floats whole = (inside * 1.44269504f + 12582912.0f) - 12582912.0f;
  // ln 2 in two parts, the first with so few bits that its product is exact.
  const Floats rest = (inside - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Floats sum = splat(1.0f / 5040.0f);
  sum = sum * rest + 1.0f / 720.0f;
  sum = sum * rest + 1.0f / 120.0f;
  sum = sum * rest + 1.0f / 24.0f;
  sum = sum * rest + 1.0f / 6.0f;
  sum = sum * rest + 0.5f;
  sum = sum * rest + 1.0f;
  sum = sum * rest + 1.0f;
  const Ints power = (__builtin_convertvector(whole, Ints) + 127) << 23;
  const Floats out = sum * reinterpret_cast<Floats>(power);
  return x < splat(-87.0f) ? splat(0.0f) : out;
}

inline float exp_of(float x) {
  return exp_of(splat(x))[0];
}

inline Floats tanh_of(Floats x) {
  const Floats size = x < splat(0.0f) ? -x : x;
  const Floats power = exp_of(-2.0f * size);
  const Floats far = (1.0f - power) / (1.0f + power);
  // Near 0 the difference above would cancel; the series would not.
  const Floats square = x * x;
  Floats near = splat(62.0f / 2835.0f);
  near = near * square - 17.0f / 315.0f;
  near = near * square + 2.0f / 15.0f;
  near = near * square - 1.0f / 3.0f;
  near = near * square * size + size;
  const Floats out = size < splat(0.25f) ? near : far;
  return x < splat(0.0f) ? -out : out;
}

}  // namespace
