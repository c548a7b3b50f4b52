#include "artifact.h"

#include <ATen/cpu/Utils.h>
#include <caffe2/serialize/inline_container.h>
#include <torch/headeronly/version.h>

#include <cstring>
#include <filesystem>
#include <memory>
#include <sstream>

namespace {

constexpr int64_t kFormatVersion = 2;

void require(bool holds, const std::string& message) {
  if (!holds) {
    throw std::runtime_error(message);
  }
}

std::string record(caffe2::serialize::PyTorchStreamReader& zip, const std::string& name) {
  const auto [data, size] = zip.getRecord(name);
  return std::string(static_cast<const char*>(data.get()), size);
}

void check_here(const Json& manifest, const std::string& path) {
  const std::string again = " Export the model again here.";
  const std::string& device = manifest["device_type"].text();
  require(device == "cpu", path + ": must be an artifact for the CPU. Got one for '" + device + "'." + again);

  const std::string& built = manifest["versions"]["torch"].text();
  const std::string here = std::to_string(TORCH_VERSION_MAJOR) + "." + std::to_string(TORCH_VERSION_MINOR) + ".";
  require(built.rfind(here, 0) == 0, path + ": must be made with torch " + here + "x. Got " + built + "." + again);

  const auto abilities = at::cpu::get_cpu_capabilities();
  std::istringstream needed(manifest["cpu_isa"].text());
  for (std::string word; needed >> word;) {
    const auto found = abilities.find(word);
    const bool is_ability = found != abilities.end() && found->second.isBool() && found->second.toBool();
    const bool is_architecture = abilities.at("architecture").toStringRef() == word;
    require(is_ability || is_architecture, path + ": was made for a CPU with " + word + ", this one lacks it." + again);
  }
}

at::ScalarType dtype_of(const std::string& name) {
  static const std::map<std::string, at::ScalarType> known = {
      {"F64", at::kDouble}, {"F32", at::kFloat}, {"F16", at::kHalf}, {"BF16", at::kBFloat16},
      {"F8_E4M3", at::kFloat8_e4m3fn}, {"F8_E5M2", at::kFloat8_e5m2},
      {"I64", at::kLong}, {"I32", at::kInt}, {"I16", at::kShort}, {"I8", at::kChar},
      {"U64", at::kUInt64}, {"U32", at::kUInt32}, {"U16", at::kUInt16}, {"U8", at::kByte}, {"BOOL", at::kBool}};
  const auto found = known.find(name);
  require(found != known.end(), "weights: dtype must be one of safetensors'. Got '" + name + "'.");
  return found->second;
}

std::vector<int64_t> integers(const Json& list) {
  std::vector<int64_t> result;
  for (const Json& number : list.list()) {
    result.push_back(number.integer());
  }
  return result;
}

// Every tensor of a safetensors file, uint8 [bytes], as a view of it.
std::unordered_map<std::string, at::Tensor> tensors_over(const at::Tensor& file, const std::string& where) {
  const std::string damaged = where + ": must be a safetensors file, whole. Copy it again.";
  uint64_t length = 0;  // the format and this code are for little-endian machines
  require(file.numel() >= 8, damaged);
  std::memcpy(&length, file.const_data_ptr(), 8);
  require(length <= static_cast<uint64_t>(file.numel() - 8), damaged);
  const char* text = static_cast<const char*>(file.const_data_ptr()) + 8;
  const Json header = Json::parse(std::string(text, length), where);

  std::unordered_map<std::string, at::Tensor> tensors;
  for (const auto& [name, entry] : header.object()) {
    const auto place = integers(entry["data_offsets"]);
    const int64_t begin = 8 + static_cast<int64_t>(length) + place.at(0);
    const int64_t end = 8 + static_cast<int64_t>(length) + place.at(1);
    require(begin <= end && end <= file.numel(), damaged);
    tensors[name] = file.slice(0, begin, end).view(dtype_of(entry["dtype"].text())).view(integers(entry["shape"]));
  }
  return tensors;
}

}  // namespace

const at::Tensor& Artifact::weight(const std::string& name) const {
  const auto found = weights.find(name);
  require(found != weights.end(), "weights: must include '" + name + "', which the manifest names. Got none.");
  return found->second;
}

Artifact read_artifact(const std::string& path) {
  namespace fs = std::filesystem;
  require(fs::is_regular_file(path), path + ": must be a file that ottfx.export wrote. There is no such file.");

  std::unique_ptr<caffe2::serialize::PyTorchStreamReader> zip;
  try {
    zip = std::make_unique<caffe2::serialize::PyTorchStreamReader>(path);
  } catch (const c10::Error&) {
    throw std::runtime_error(path + ": must be a file that ottfx.export wrote. Got one that is no archive.");
  }
  require(
      zip->hasRecord("extra/ottfx.json"),
      path + ": must be a file that ottfx.export wrote. Got an archive without a manifest.");

  Artifact artifact;
  artifact.manifest = Json::parse(record(*zip, "extra/ottfx.json"), path + ": manifest");
  const Json& manifest = artifact.manifest;
  const int64_t version = manifest["format_version"].integer();
  require(
      version == kFormatVersion,
      path + ": format_version must be " + std::to_string(kFormatVersion) + ". Got " + std::to_string(version) + ".");
  check_here(manifest, path);

  // A private map of a whole file; a tensor is a view of its bytes, which are read when they are used.
  const auto map = [](const std::string& file) {
    require(fs::is_regular_file(file), file + ": must be the weights of the artifact. There is no such file.");
    return at::from_file(file, /*shared=*/false, static_cast<int64_t>(fs::file_size(file)), at::kByte);
  };
  const Json& entry = manifest["weights"];
  const std::string& name = entry["file"].text();
  if (entry["location"].text() == "inside") {
    const auto begin = static_cast<int64_t>(zip->getRecordOffset(name));
    const auto size = static_cast<int64_t>(zip->getRecordSize(name));
    artifact.weights = tensors_over(map(path).narrow(0, begin, size), path + ": " + name);
  } else {
    const std::string file = fs::path(path).replace_filename(name).string();
    artifact.weights = tensors_over(map(file), file);
  }
  for (const auto& [weight, strides] : entry["strides"].object()) {
    const at::Tensor& stored = artifact.weight(weight);
    artifact.weights[weight] = at::empty_strided(stored.sizes(), integers(strides), stored.options()).copy_(stored);
  }
  for (const auto& [alias, weight] : entry["aliases"].object()) {
    artifact.weights[alias] = artifact.weight(weight.text());
  }
  return artifact;
}
