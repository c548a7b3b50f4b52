// The compiled programs of an artifact, with their weights.
#pragma once

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <map>
#include <memory>
#include <string>

#include "artifact.h"
#include "cache.h"

class Program {
 public:
  explicit Program(const std::string& path);

  const Json& manifest() const { return artifact_.manifest; }

  // Appends tokens to the cache; returns the logits of the last one, [batch, 1, vocabulary].
  // input_ids int64 [batch, q]; attention_mask int64 [batch, stored + q], 0 for padding, on the left.
  at::Tensor step(const at::Tensor& input_ids, const at::Tensor& attention_mask, Cache& cache);

 private:
  Artifact artifact_;  // holds the weights, which the loaders do not keep alive
  std::map<std::string, std::unique_ptr<torch::inductor::AOTIModelPackageLoader>> loaders_;
};
