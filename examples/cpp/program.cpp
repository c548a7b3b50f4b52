#include "program.h"

Program::Program(const std::string& path) : artifact_(read_artifact(path)) {
  for (const auto& [name, entry] : manifest()["programs"].object()) {
    auto loader = std::make_unique<torch::inductor::AOTIModelPackageLoader>(path, name);
    std::unordered_map<std::string, at::Tensor> constants;
    for (const auto& [constant, weight] : entry["constants"].object()) {
      constants[constant] = artifact_.weight(weight.text());
    }
    // The programs share the tensors: none copies them.
    loader->load_constants(constants, /*use_inactive=*/false, /*check_full_update=*/true, /*user_managed=*/true);
    loaders_[name] = std::move(loader);
  }
}

at::Tensor Program::step(const at::Tensor& input_ids, const at::Tensor& attention_mask, Cache& cache) {
  const int64_t past = cache.length();
  const int64_t q_len = input_ids.size(1);
  cache.make_room(past + q_len);
  std::vector<at::Tensor> inputs = {input_ids, attention_mask, at::empty({past, 0}, at::kByte), cache.lengths()};
  inputs.insert(inputs.end(), cache.tensors().begin(), cache.tensors().end());
  const char* name = q_len == 1 ? "decode" : past > 0 ? "extend" : "prefill";
  at::Tensor logits = loaders_.at(name)->run(inputs).at(0);
  cache.advance(past + q_len);
  return logits;
}
