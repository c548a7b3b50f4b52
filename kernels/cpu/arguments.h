// What ottfx/cpu_attend.py passes: its `_Arguments` has the fields of `Arguments` in the same order.

#pragma once

#include "numbers.h"

namespace ottfx {

enum Type : int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kInt8 = 3, kBool = 4 };

// Contiguous tensors with the names and shapes of docs/storage.md; pointers to what is not there are null.
struct Arguments {
  int64_t batch, kv_heads, group_heads, q_len, head_dim;  // group_heads: query heads of a kv head
  int64_t capacity, key_groups, value_groups;             // pages; key groups of a page; value groups of a token
  int64_t key_bits, value_bits;
  int64_t window_rows, window_type, pool_rows, pool_type, page_seats, mask_type;
  int64_t mask_strides[4];  // in elements, of [batch, heads, queries, columns]; 0 where broadcast
  double softmax_scale;
  const int64_t* lengths;  // past, key_packed, value_packed
  const float *query, *key, *value;
  const uint32_t *key_codes, *value_codes;
  const Half *key_scale, *key_zero_point, *value_scale, *value_zero_point;
  const int16_t* key_order;
  const void *key_residual, *value_residual;
  const Half *key_residual_scale, *value_residual_scale;  // of int8 rows
  const void *outlier_key, *outlier_value;
  const int32_t* outlier_position;
  const int8_t *seat_key, *seat_value, *seat_row;
  const Half *seat_key_scale, *seat_value_scale;
  const void* mask;
  float* result;  // [batch, kv_heads, group_heads, q_len, head_dim], as `query`
};

}  // namespace ottfx
