// The file that ottfx.export writes: a manifest, and weights over a memory map.
#pragma once

#include <ATen/ATen.h>

#include <string>
#include <unordered_map>

#include "json.h"

struct Artifact {
  Json manifest;
  std::unordered_map<std::string, at::Tensor> weights;

  // Throws std::runtime_error if there is none of this name.
  const at::Tensor& weight(const std::string& name) const;
};

// Throws std::runtime_error: not such a file, or its programs cannot run here. Checksums are not compared: for that
// use `ottfx.load(path)`.
Artifact read_artifact(const std::string& path);
