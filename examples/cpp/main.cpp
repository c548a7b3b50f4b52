// generate: continue token ids greedily with an artifact of ottfx.export. Needs libtorch, and no Python.

#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <iostream>
#include <limits>
#include <set>
#include <sstream>

#include "program.h"

namespace {

using Row = std::vector<int64_t>;

const char* const kUsage =
    "usage: generate MODEL.pt2 --tokens 1,2,3 [--tokens 4,5 ...] --max-new-tokens N [--chunk N]\n"
    "Prints the new token ids of each row, one row a line. --chunk: tokens of the prompt that are read at once.";

struct Options {
  std::string model;
  std::vector<Row> rows;
  int64_t max_new_tokens = 0;
  int64_t chunk = std::numeric_limits<int64_t>::max();
};

int64_t parse_number(const std::string& text) {
  size_t end = 0;
  int64_t number = -1;
  try {
    number = std::stoll(text, &end);
  } catch (const std::logic_error&) {
  }
  if (number < 0 || end != text.size()) {
    throw std::runtime_error("must be a number from 0 on. Got '" + text + "'.\n" + kUsage);
  }
  return number;
}

Row parse_row(const std::string& text) {
  Row row;
  std::istringstream words(text);
  for (std::string word; std::getline(words, word, ',');) {
    row.push_back(parse_number(word));
  }
  return row;
}

Options parse_options(const std::vector<std::string>& words) {
  Options options;
  for (size_t i = 0; i < words.size(); ++i) {
    const bool has_value = i + 1 < words.size();
    if (words[i] == "--tokens" && has_value) {
      options.rows.push_back(parse_row(words[++i]));
    } else if (words[i] == "--max-new-tokens" && has_value) {
      options.max_new_tokens = parse_number(words[++i]);
    } else if (words[i] == "--chunk" && has_value) {
      options.chunk = parse_number(words[++i]);
    } else if (words[i].rfind("--", 0) != 0 && options.model.empty()) {
      options.model = words[i];
    } else {
      throw std::runtime_error("must be an option, with its value. Got '" + words[i] + "'.\n" + kUsage);
    }
  }
  const bool has_empty_row =
      std::any_of(options.rows.begin(), options.rows.end(), [](const Row& row) { return row.empty(); });
  if (options.model.empty() || options.rows.empty() || has_empty_row || !options.max_new_tokens || !options.chunk) {
    throw std::runtime_error(std::string("a model, tokens and numbers from 1 on must be given.\n") + kUsage);
  }
  return options;
}

void check_vocabulary(const std::vector<Row>& rows, const Json& manifest) {
  const Json& size = manifest["model"]["vocab_size"];
  for (const Row& row : rows) {
    for (const int64_t token : row) {
      if (!size.is_null() && token >= size.integer()) {
        throw std::runtime_error(
            "--tokens: must be below " + std::to_string(size.integer()) + ", the model's vocabulary. Got " +
            std::to_string(token) + ".");
      }
    }
  }
}

std::set<int64_t> end_tokens(const Json& manifest) {
  std::set<int64_t> tokens;
  const Json& config = manifest["model"]["generation_config"];
  if (config.is_null() || config.object().count("eos_token_id") == 0) {
    return tokens;
  }
  const Json& ids = config["eos_token_id"];
  if (ids.is_list()) {
    for (const Json& id : ids.list()) {
      tokens.insert(id.integer());
    }
  } else if (!ids.is_null()) {
    tokens.insert(ids.integer());
  }
  return tokens;
}

// The new tokens of each row; a row ends with its end token, if it finds one.
std::vector<Row> generate(Program& program, const Options& options) {
  const std::vector<Row>& rows = options.rows;
  const auto batch = static_cast<int64_t>(rows.size());
  int64_t longest = 0;
  for (const Row& row : rows) {
    longest = std::max(longest, static_cast<int64_t>(row.size()));
  }
  at::Tensor ids = at::zeros({batch, longest}, at::kLong);
  at::Tensor mask = at::zeros_like(ids);
  for (int64_t i = 0; i < batch; ++i) {
    const auto length = static_cast<int64_t>(rows[i].size());
    ids[i].slice(0, longest - length).copy_(at::tensor(rows[i], at::kLong));
    mask[i].slice(0, longest - length).fill_(1);
  }

  const std::set<int64_t> ends = end_tokens(program.manifest());
  std::vector<Row> result(batch);
  std::vector<bool> has_ended(batch, false);
  Cache cache(program.manifest(), batch);
  while (longest - cache.length() > options.chunk) {
    const int64_t begin = cache.length();
    const int64_t end = begin + options.chunk;
    program.step(ids.slice(1, begin, end).contiguous(), mask.slice(1, 0, end).contiguous(), cache);
  }
  ids = ids.slice(1, cache.length()).contiguous();
  for (int64_t count = 0; count < options.max_new_tokens; ++count) {
    ids = program.step(ids, mask, cache).select(1, -1).argmax(-1, /*keepdim=*/true);
    mask = at::cat({mask, at::ones({batch, 1}, at::kLong)}, 1);
    for (int64_t i = 0; i < batch; ++i) {
      const auto token = ids[i].item<int64_t>();
      if (!has_ended[i]) {
        result[i].push_back(token);
        has_ended[i] = ends.count(token) != 0;
      }
    }
    if (std::find(has_ended.begin(), has_ended.end(), false) == has_ended.end()) {
      break;
    }
  }
  return result;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const Options options = parse_options({argv + 1, argv + argc});
    const c10::InferenceMode inference;
    Program program(options.model);
    check_vocabulary(options.rows, program.manifest());
    for (const Row& row : generate(program, options)) {
      for (size_t i = 0; i < row.size(); ++i) {
        std::cout << (i == 0 ? "" : ",") << row[i];
      }
      std::cout << "\n";
    }
  } catch (const c10::Error& error) {
    std::cerr << "generate: " << error.what_without_backtrace() << "\n";
    return 1;
  } catch (const std::exception& error) {
    std::cerr << "generate: " << error.what() << "\n";
    return 1;
  }
  return 0;
}
