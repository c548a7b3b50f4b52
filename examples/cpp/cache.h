// The packed cache of one batch, which programs write in place.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <string>
#include <vector>

#include "json.h"

class Cache {
 public:
  // Makes an empty cache for `batch` sequences, laid out as the manifest says.
  Cache(const Json& manifest, int64_t batch);

  // Tokens stored, padding included.
  int64_t length() const { return length_; }

  // Makes the storage large enough for `length` tokens; copies what it holds.
  void make_room(int64_t length);

  // int64 [layers, 3]: (tokens stored, of which keys packed, values packed).
  at::Tensor lengths() const;

  // The state tensors, in the order in which programs take them.
  const std::vector<at::Tensor>& tensors() const { return tensors_; }

  // Records that a program appended tokens up to `length`.
  void advance(int64_t length);

 private:
  static constexpr int64_t kPage = 128;  // tokens

  struct Layout {
    std::vector<int64_t> sizes;  // of one page
    at::ScalarType dtype;
    double fill;
    std::optional<int64_t> paged_dim;  // the axis that grows with the pages
  };

  // One half, keys or values, of a layer. What is not packed is kept in full precision.
  struct Half {
    int64_t window;
    int64_t step;  // 0: nothing is ever packed
    int64_t packed;
  };

  at::Tensor allocate(const Layout& layout) const;

  int64_t length_ = 0;
  int64_t pages_ = 2;  // at least: programs take their number for one that is neither 0 nor 1
  std::vector<Half> halves_;
  std::vector<Layout> layouts_;
  std::vector<at::Tensor> tensors_;
};
