#include "cache.h"

#include <algorithm>

Cache::Cache(const Json& manifest, int64_t batch) {
  for (const Json& site : manifest["sites"].list()) {
    for (const char* role : {"key", "value"}) {
      const Json& schedule = site["schedule"][role];
      halves_.push_back(
          schedule.is_null() ? Half{0, 0, 0}
                             : Half{schedule.list().at(0).integer(), schedule.list().at(1).integer(), 0});
    }
  }
  for (const Json& entry : manifest["state"].list()) {
    Layout layout{{}, c10::getStringToDtypeMap().at(entry["dtype"].text()), entry["fill"].number(), std::nullopt};
    for (const Json& size : entry["shape"].list()) {
      if (!size.is_text()) {
        layout.sizes.push_back(size.integer());
      } else if (size.text() == "batch") {
        layout.sizes.push_back(batch);
      } else {  // "pages" or "4*pages"
        layout.paged_dim = static_cast<int64_t>(layout.sizes.size());
        layout.sizes.push_back(size.text() == "pages" ? 1 : std::stoll(size.text()));
      }
    }
    tensors_.push_back(allocate(layout));
    layouts_.push_back(std::move(layout));
  }
}

void Cache::make_room(int64_t length) {
  const int64_t needed = (length + kPage - 1) / kPage;
  if (needed <= pages_) {
    return;
  }
  pages_ = std::max(needed, 2 * pages_);
  for (size_t i = 0; i < tensors_.size(); ++i) {
    if (const auto dim = layouts_[i].paged_dim) {
      at::Tensor grown = allocate(layouts_[i]);
      grown.narrow(*dim, 0, tensors_[i].size(*dim)).copy_(tensors_[i]);
      tensors_[i] = grown;
    }
  }
}

at::Tensor Cache::lengths() const {
  at::Tensor result = at::empty({static_cast<int64_t>(halves_.size() / 2), 3}, at::kLong);
  auto* numbers = result.mutable_data_ptr<int64_t>();
  for (size_t i = 0; i < halves_.size(); i += 2) {
    *numbers++ = length_;
    *numbers++ = halves_[i].packed;
    *numbers++ = halves_[i + 1].packed;
  }
  return result;
}

void Cache::advance(int64_t length) {
  length_ = length;
  for (Half& half : halves_) {
    if (half.step != 0 && length > half.window) {
      half.packed = std::max(half.packed, (length - half.window) / half.step * half.step);
    }
  }
}

at::Tensor Cache::allocate(const Layout& layout) const {
  std::vector<int64_t> sizes = layout.sizes;
  if (layout.paged_dim) {
    sizes[*layout.paged_dim] *= pages_;
  }
  return at::full(sizes, layout.fill, layout.dtype);
}
