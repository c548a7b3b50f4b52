// Attention of a few query rows over affine storage on a CPU: one pass over the packed codes, no dense copy of them.
//
// What is stored and what is computed: docs/storage.md; the definition: ottfx/affine_read.py.
//
// The tokens of one head, which here is one kv head of one sequence, are cut into tiles of up to 128: packed pages, then
// rows of the window, of the outlier pool, of the seats, and the new tokens. A task is a range of tiles; its softmax runs
// over them in float32. The results of the tasks of a head are joined in the end.

#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "arguments.h"
#include "packed_page.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace ottfx {

constexpr int64_t kPage = 128;
constexpr float kHidden = -std::numeric_limits<float>::infinity();

int64_t pages_of(int64_t tokens) { return (tokens + kPage - 1) / kPage; }

void widen(int64_t type, const void* from, int64_t first, int64_t count, float* to) {
  if (type == kFloat32) widen<float>(from, first, count, to);
  if (type == kBFloat16) widen<BFloat>(from, first, count, to);
  if (type == kFloat16) widen<Half>(from, first, count, to);
  if (type == kInt8) widen<int8_t>(from, first, count, to);
}

// Of all query rows of a head, over some of its tiles. `rows` are the query heads of the kv head by the new tokens.
struct Partial {
  float* sums;     // [rows, head_dim]: of values by their weights
  float* highest;  // [rows]: score that has weight 1
  float* total;    // [rows]: of weights

  Partial(float* memory, int64_t rows, int64_t dim)
      : sums(memory), highest(memory + rows * dim), total(highest + rows) {}
  static int64_t size(int64_t rows, int64_t dim) { return rows * (dim + 2); }
};

// Rows in full precision, or int8 with a scale, of one head.
struct DenseRows {
  const void *key, *value;
  int64_t type, first;  // first: index of the head's row 0
  const Half *key_scale = nullptr, *value_scale = nullptr;
};

class Task {
 public:
  Task(const Arguments& a, int64_t head, Partial out)
      : a(a), head(head), rows(a.group_heads * a.q_len), dim(a.head_dim), past(a.lengths[0]), packed(a.lengths[2]),
        window_start(std::max(packed, past - a.window_rows)), out(out), query(rows * dim), stored_query(rows * dim),
        scores(rows * kPage), bias(kPage), row_values(dim), constants(kMostRows * std::max(a.key_groups, a.value_groups)) {
    const int64_t folded = std::max(a.key_groups * dim, a.value_groups * kPage);
    scales.resize(folded);
    zero_points.resize(folded);
    vectors.resize(kMostRows * folded);
    std::fill(out.sums, out.sums + rows * dim, 0.0f);
    std::fill(out.highest, out.highest + rows, kHidden);
    std::fill(out.total, out.total + rows, 0.0f);
    const int16_t* order = a.key_order ? a.key_order + head * dim : nullptr;
    key_layout = !order ? layout_of(a.key_bits) : order[0] >= kSteepMark ? kSteep : kGradual;
    for (int64_t q = 0; q < rows; ++q) {
      const float* from = a.query + (head * rows + q) * dim;
      for (int64_t d = 0; d < dim; ++d) query[q * dim + d] = from[d] * float(a.softmax_scale);
      for (int64_t d = 0; d < dim; ++d)
        stored_query[q * dim + d] = query[q * dim + (order && order[d] >= 0 ? order[d] % kSteepMark : d)];
    }
  }

  int64_t tiles() const {
    return pages_of(packed) + pages_of(past - window_start) + pages_of(a.pool_rows) + pages_of(seats()) +
           pages_of(a.q_len);
  }

  void add_tile(int64_t tile) {
    if (tile < pages_of(packed)) return add_page(tile);
    tile -= pages_of(packed);
    if (tile < pages_of(past - window_start)) return add_window(window_start + tile * kPage);
    tile -= pages_of(past - window_start);
    if (tile < pages_of(a.pool_rows)) return add_pool(tile * kPage);
    tile -= pages_of(a.pool_rows);
    if (tile < pages_of(seats())) return add_seats(tile * kPage);
    add_new((tile - pages_of(seats())) * kPage);
  }

 private:
  const Arguments& a;
  const int64_t head, rows, dim, past, packed, window_start;
  const Partial out;
  int key_layout;
  std::vector<float> query, stored_query;  // [rows, head_dim], by the softmax scale; channels as keys store them
  std::vector<float> scores;               // [rows, tokens of the tile], then weights
  std::vector<float> bias, row_values, constants, scales, zero_points, vectors;
  int64_t position[kPage];  // of the tile's tokens; -1: not attended
  int64_t row[kPage];       // of the tile's tokens in `DenseRows`

  void add_page(int64_t page) {
    const int64_t index = head * a.capacity + page;
    const Half* value_scale = a.value_scale + index * a.value_groups * kPage;
    for (int64_t t = 0; t < kPage; ++t) {
      const int64_t slot = page * kPage + t;
      position[t] = slot < packed && !(value_scale[t].bits & 0x8000) ? slot : -1;
    }
    const int64_t key_constants = a.key_groups * dim, value_constants = a.value_groups * kPage;
    widen<Half>(a.key_scale, index * key_constants, key_constants, scales.data());
    widen<Half>(a.key_zero_point, index * key_constants, key_constants, zero_points.data());
    std::fill(scores.begin(), scores.end(), 0.0f);
    multiply(key_layout, a.key_codes + index * kPage * dim * a.key_bits / 32, kPage, dim, a.key_groups,
             stored_query.data(), scores.data());
    weigh();
    widen<Half>(value_scale, 0, value_constants, scales.data());
    for (int64_t t = 0; t < kPage; ++t) scales[t] = std::fabs(scales[t]);
    if (a.value_zero_point) {
      widen<Half>(a.value_zero_point, index * value_constants, value_constants, zero_points.data());
    } else {
      const float middle = 0.5f * float((1 << a.value_bits) - 1);
      for (int64_t i = 0; i < value_constants; ++i) zero_points[i] = -middle * scales[i];
    }
    // Behind the packed tokens the storage may hold anything.
    const int64_t live = std::min(kPage, packed - page * kPage);
    for (int64_t group = 0; group < a.value_groups; ++group) {
      std::fill(&scales[group * kPage + live], &scales[group * kPage] + kPage, 0.0f);
      std::fill(&zero_points[group * kPage + live], &zero_points[group * kPage] + kPage, 0.0f);
    }
    multiply(layout_of(a.value_bits), a.value_codes + index * kPage * dim * a.value_bits / 32, dim, kPage,
             a.value_groups, scores.data(), out.sums);
  }

  // to[q][r] += sum over c of (code(r, c) * scales[group of r][c] + zero_points[group of r][c]) * from[q][c].
  void multiply(int layout, const uint32_t* words, int64_t page_rows, int64_t contraction, int64_t groups,
                const float* from, float* to) {
    for (int64_t q = 0; q < rows; q += kMostRows, from += kMostRows * contraction, to += kMostRows * page_rows) {
      const int64_t count = std::min<int64_t>(kMostRows, rows - q);
      for (int64_t group = 0; group < groups; ++group)
        for (int64_t i = 0; i < count; ++i) {
          float* vector = vectors.data() + (group * count + i) * contraction;
          for (int64_t c = 0; c < contraction; ++c)
            vector[c] = from[i * contraction + c] * scales[group * contraction + c];
          constants[group * count + i] = dot(from + i * contraction, &zero_points[group * contraction], contraction);
        }
      multiply_of(layout, int(count))(words, page_rows, contraction, page_rows / groups, vectors.data(),
                                      constants.data(), to);
    }
  }

  void add_window(int64_t first) {
    for (int64_t t = 0; t < kPage; ++t) {
      position[t] = first + t < past ? first + t : -1;
      row[t] = (first + t) % a.window_rows;
    }
    add_rows({a.key_residual, a.value_residual, a.window_type, head * a.window_rows, a.key_residual_scale,
              a.value_residual_scale});
  }

  void add_pool(int64_t first) {
    for (int64_t t = 0; t < kPage; ++t) {
      row[t] = first + t;
      position[t] = row[t] < a.pool_rows ? a.outlier_position[head * a.pool_rows + row[t]] : -1;
      if (position[t] >= past) position[t] = -1;
    }
    add_rows({a.outlier_key, a.outlier_value, a.pool_type, head * a.pool_rows});
  }

  // Of the pages that hold packed tokens.
  int64_t seats() const { return pages_of(packed) * a.page_seats; }

  void add_seats(int64_t first) {
    const int64_t first_of_head = head * a.capacity * a.page_seats;
    for (int64_t t = 0; t < kPage; ++t) {
      row[t] = first + t;
      const int64_t in_page = row[t] < seats() ? a.seat_row[first_of_head + row[t]] : -1;
      position[t] = in_page < 0 ? -1 : row[t] / a.page_seats * kPage + in_page;
      if (position[t] >= packed) position[t] = -1;
    }
    add_rows({a.seat_key, a.seat_value, kInt8, first_of_head, a.seat_key_scale, a.seat_value_scale});
  }

  void add_new(int64_t first) {
    for (int64_t t = 0; t < kPage; ++t) {
      row[t] = first + t;
      position[t] = row[t] < a.q_len ? past + row[t] : -1;
    }
    add_rows({a.key, a.value, kFloat32, head * a.q_len});
  }

  void add_rows(const DenseRows& from) {
    std::fill(scores.begin(), scores.end(), 0.0f);
    for (int64_t t = 0; t < kPage; ++t) {
      if (position[t] < 0) continue;
      read_row(from.key, from.type, from.key_scale, from.first + row[t]);
      for (int64_t q = 0; q < rows; ++q) scores[q * kPage + t] = dot(&query[q * dim], row_values.data(), dim);
    }
    weigh();
    for (int64_t t = 0; t < kPage; ++t) {
      if (position[t] < 0) continue;
      read_row(from.value, from.type, from.value_scale, from.first + row[t]);
      for (int64_t q = 0; q < rows; ++q) {
        const float weight = scores[q * kPage + t];
        for (int64_t d = 0; d < dim; ++d) out.sums[q * dim + d] += weight * row_values[d];
      }
    }
  }

  void read_row(const void* from, int64_t type, const Half* scale, int64_t index) {
    widen(type, from, index * dim, dim, row_values.data());
    if (scale)
      for (float& x : row_values) x *= float(scale[index]);
  }

  // Turns scores into weights, relative to the highest score so far, and what was summed up to them.
  void weigh() {
    int64_t read = -1;
    for (int64_t q = 0; q < rows; ++q) {
      const int64_t* stride = a.mask_strides;
      const int64_t query_head = head % a.kv_heads * a.group_heads + q / a.q_len;
      const int64_t mask_row = head / a.kv_heads * stride[0] + query_head * stride[1] + q % a.q_len * stride[2];
      if (mask_row != read) read_bias(mask_row);
      read = mask_row;
      float* score = &scores[q * kPage];
      float highest = out.highest[q];
      for (int64_t t = 0; t < kPage; ++t) score[t] = bias[t] == kHidden ? kHidden : score[t] + bias[t];
      for (int64_t t = 0; t < kPage; ++t) highest = std::max(highest, score[t]);
      if (highest == kHidden) {
        std::fill(score, score + kPage, 0.0f);
        continue;
      }
      const float factor = std::exp(out.highest[q] - highest);
      Floats total{};
      for (int64_t t = 0; t < kPage; t += kLanes) {
        const Floats weight = exponential(load<Floats>(score + t) - highest);
        store(weight, score + t);
        total += weight;
      }
      for (int64_t d = 0; d < dim; ++d) out.sums[q * dim + d] *= factor;
      out.total[q] = out.total[q] * factor + sum_of(total);
      out.highest[q] = highest;
    }
  }

  void read_bias(int64_t mask_row) {
    switch (a.mask_type) {
      case kBool: return read_bias<bool>(mask_row, 0.0f);
      case kFloat32: return read_bias<float>(mask_row, std::numeric_limits<float>::lowest());
      case kBFloat16: return read_bias<BFloat>(mask_row, -0x1.fep127f);
      case kFloat16: return read_bias<Half>(mask_row, -65504.0f);
      default:
        for (int64_t t = 0; t < kPage; ++t) bias[t] = position[t] < 0 ? kHidden : 0.0f;
    }
  }

  template <class T>
  void read_bias(int64_t mask_row, float lowest) {
    const T* mask = static_cast<const T*>(a.mask) + mask_row;
    for (int64_t t = 0; t < kPage; ++t) {
      bias[t] = kHidden;
      if (position[t] < 0) continue;
      const T entry = mask[position[t] * a.mask_strides[3]];
      if constexpr (std::is_same_v<T, bool>) {
        if (entry) bias[t] = 0.0f;
      } else if (float(entry) > lowest / 2) {
        bias[t] = float(entry);
      }
    }
  }
};

void join(const Arguments& a, int64_t head, float* memory, int64_t splits) {
  const int64_t rows = a.group_heads * a.q_len, dim = a.head_dim, size = Partial::size(rows, dim);
  for (int64_t q = 0; q < rows; ++q) {
    float highest = kHidden, total = 0.0f;
    for (int64_t s = 0; s < splits; ++s) highest = std::max(highest, Partial(memory + s * size, rows, dim).highest[q]);
    float* to = a.result + (head * rows + q) * dim;
    std::fill(to, to + dim, 0.0f);
    if (highest == kHidden) continue;
    for (int64_t s = 0; s < splits; ++s) {
      const Partial part(memory + s * size, rows, dim);
      const float factor = std::exp(part.highest[q] - highest);
      total += part.total[q] * factor;
      for (int64_t d = 0; d < dim; ++d) to[d] += part.sums[q * dim + d] * factor;
    }
    for (int64_t d = 0; d < dim; ++d) to[d] /= total;
  }
}

}  // namespace ottfx

extern "C" void ottfx_affine_attend(const ottfx::Arguments* arguments) {
  using namespace ottfx;
  const Arguments& a = *arguments;
  const int64_t heads = a.batch * a.kv_heads, rows = a.group_heads * a.q_len;
  int64_t splits = 1;
#ifdef _OPENMP
  // Several tasks a thread, so that none waits long for the slowest.
  const int64_t threads = omp_get_max_threads();
  if (threads > 1) splits = (4 * threads + heads - 1) / heads;
#endif
  const int64_t size = Partial::size(rows, a.head_dim);
  std::vector<float> partials(heads * splits * size);
#pragma omp parallel
  {
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < heads * splits; ++i) {
      const int64_t head = i / splits, split = i % splits;
      Task task(a, head, Partial(partials.data() + i * size, rows, a.head_dim));
      const int64_t tiles = task.tiles();
      for (int64_t tile = tiles * split / splits; tile < tiles * (split + 1) / splits; ++tile) task.add_tile(tile);
    }
#pragma omp for nowait
    for (int64_t head = 0; head < heads; ++head) join(a, head, partials.data() + head * splits * size, splits);
  }
}
