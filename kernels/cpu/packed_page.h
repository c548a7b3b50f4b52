// A packed page times a few vectors. Layout of the words: docs/storage.md, *Codes*.
//
// A page is a matrix [rows, contraction], and is multiplied along the contraction axis. Keys: by queries, folded with the
// scales of the channels. Values: by weights of the softmax, folded with the scales of the tokens.

#pragma once

#include "numbers.h"

namespace ottfx {

constexpr int kMostRows = 4;  // vectors that share one pass over a page: their sums stay in registers

// Where the elements of a word are: `elements` neighbours along the contraction axis.
struct Layout {
  int elements;
  int width[16], position[16];
  bool has_plane;  // one bit more, in a 1-bit plane behind the page's words
};

constexpr Layout uniform(int width, bool has_plane) {
  Layout layout{32 / width, {}, {}, has_plane};
  for (int i = 0; i < layout.elements; ++i) {
    layout.width[i] = width;
    layout.position[i] = width * (i / 2) + 16 * (i % 2);
  }
  return layout;
}

constexpr Layout mixed(const int (&widths)[8]) {
  Layout layout{16, {}, {}, false};
  for (int i = 0, end = 0; i < 8; end += widths[i++])
    for (int half = 0; half < 2; ++half) {
      layout.width[2 * i + half] = widths[i];
      layout.position[2 * i + half] = end + 16 * half;
    }
  return layout;
}

constexpr Layout kLayout[] = {uniform(2, false),
                              uniform(2, true),
                              uniform(4, false),
                              uniform(8, false),
                              mixed({4, 3, 2, 1, 2, 2, 1, 1}),
                              mixed({4, 4, 1, 1, 3, 1, 1, 1})};
constexpr int kGradual = 4, kSteep = 5;
constexpr int kSteepMark = 16384;  // in the order of the channels of a head with steep widths
inline int layout_of(int64_t bits) { return bits == 2 ? 0 : bits == 3 ? 1 : bits == 4 ? 2 : 3; }

// The third bits of 16 codes of `kLanes` rows: the words of a 1-bit plane hold the rows of both halves of a page.
inline Words load_plane(const uint32_t* words, int64_t row, int64_t rows) {
  Words bits;
  for (int lane = 0; lane < kLanes; ++lane) {
    const int64_t half = rows / 2, r = row + lane;
    bits[lane] = r < half ? words[r] : words[r - half] >> 8;
  }
  return bits;
}

// sums[q][row] += constants[group][q] + sum over c of code(row, c) * vectors[group][q][c]: kRows vectors q for each group
// of `group_rows` neighbouring rows, a multiple of 16, as rows and contraction are.
template <int kLayoutIndex, int kRows>
void multiply_page(const uint32_t* words, int64_t rows, int64_t contraction, int64_t group_rows, const float* vectors,
                   const float* constants, float* sums) {
  constexpr Layout layout = kLayout[kLayoutIndex];
  const uint32_t* plane = words + rows * contraction / 16;
  for (int64_t row = 0; row < rows; row += kLanes) {
    const int64_t group = row / group_rows;
    const float* vector = vectors + group * kRows * contraction;
    Floats sum[2][kRows];  // of even and odd elements: additions wait for each other less
    for (int q = 0; q < kRows; ++q) {
      sum[0][q] = load<Floats>(sums + q * rows + row) + constants[group * kRows + q];
      sum[1][q] = Floats{};
    }
    for (int64_t strip = 0; strip < contraction / layout.elements; ++strip) {
      const Words word = load<Words>(words + strip * rows + row);
      Words third{};
      if (layout.has_plane) third = load_plane(plane + strip * rows / 2, row, rows);
#pragma GCC unroll 16
      for (int i = 0; i < layout.elements; ++i) {
        Words code = (word >> layout.position[i]) & ((1u << layout.width[i]) - 1);
        if (layout.has_plane) code |= ((third >> (i / 2 + 16 * (i % 2))) & 1u) << 2;
        const Floats x = __builtin_convertvector((Ints)code, Floats);
        for (int q = 0; q < kRows; ++q) sum[i % 2][q] += x * vector[q * contraction + strip * layout.elements + i];
      }
    }
    for (int q = 0; q < kRows; ++q) store(sum[0][q] + sum[1][q], sums + q * rows + row);
  }
}

using Multiply = decltype(&multiply_page<0, 1>);

template <int kLayoutIndex>
Multiply multiply_of(int rows) {
  constexpr Multiply by_rows[kMostRows] = {multiply_page<kLayoutIndex, 1>, multiply_page<kLayoutIndex, 2>,
                                           multiply_page<kLayoutIndex, 3>, multiply_page<kLayoutIndex, 4>};
  return by_rows[rows - 1];
}

inline Multiply multiply_of(int layout, int rows) {
  switch (layout) {
    case 0: return multiply_of<0>(rows);
    case 1: return multiply_of<1>(rows);
    case 2: return multiply_of<2>(rows);
    case 3: return multiply_of<3>(rows);
    case kGradual: return multiply_of<kGradual>(rows);
    default: return multiply_of<kSteep>(rows);
  }
}

}  // namespace ottfx
