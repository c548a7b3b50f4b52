// JSON as Python's json.dumps(ensure_ascii=False) writes it; what this needs to read a manifest, and no more.
#pragma once

#include <cctype>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

class Json {
 public:
  using List = std::vector<Json>;
  using Object = std::map<std::string, Json>;

  Json() : value_(nullptr) {}

  // Throws std::runtime_error; `where` is how errors call the text.
  static Json parse(const std::string& text, const std::string& where) {
    Reader reader{text, where, 0};
    Json value = reader.value();
    if (reader.next() != '\0') {
      reader.fail("the end");
    }
    return value;
  }

  bool is_null() const { return std::holds_alternative<std::nullptr_t>(value_); }
  bool is_text() const { return std::holds_alternative<std::string>(value_); }
  bool is_list() const { return std::holds_alternative<List>(value_); }

  const std::string& text() const { return as<std::string>("a string"); }
  double number() const { return as<double>("a number"); }
  int64_t integer() const { return static_cast<int64_t>(number()); }
  const List& list() const { return as<List>("an array"); }
  const Object& object() const { return as<Object>("an object"); }

  const Json& operator[](const std::string& name) const {
    const auto found = object().find(name);
    if (found == object().end()) {
      throw std::runtime_error("manifest: must have a field '" + name + "'. Got none. Export the model again.");
    }
    return found->second;
  }

 private:
  struct Reader {
    const std::string& text;
    const std::string& where;
    size_t at;

    [[noreturn]] void fail(const std::string& expected) const {
      throw std::runtime_error(
          where + ": must be JSON. Expected " + expected + " at byte " + std::to_string(at) + ". The file is damaged.");
    }

    char next() {
      while (at < text.size() && std::isspace(static_cast<unsigned char>(text[at]))) {
        ++at;
      }
      return at < text.size() ? text[at] : '\0';
    }

    bool take(std::string_view word) {
      next();
      const bool is_there = text.compare(at, word.size(), word) == 0;
      at += is_there ? word.size() : 0;
      return is_there;
    }

    void demand(std::string_view word) {
      if (!take(word)) {
        fail("'" + std::string(word) + "'");
      }
    }

    Json value() {
      if (take("{")) {
        Object object;
        for (bool more = !take("}"); more; more = !take("}")) {
          if (!object.empty()) {
            demand(",");
          }
          std::string name = string();
          demand(":");
          object[name] = value();
        }
        return Json(std::move(object));
      }
      if (take("[")) {
        List list;
        for (bool more = !take("]"); more; more = !take("]")) {
          if (!list.empty()) {
            demand(",");
          }
          list.push_back(value());
        }
        return Json(std::move(list));
      }
      if (next() == '"') {
        return Json(string());
      }
      if (take("null")) {
        return Json(nullptr);
      }
      if (take("true")) {
        return Json(true);
      }
      if (take("false")) {
        return Json(false);
      }
      // NaN and Infinity, which Python writes, are numbers to strtod as well.
      char* end = nullptr;
      const double number = std::strtod(text.c_str() + at, &end);
      if (end == text.c_str() + at) {
        fail("a value");
      }
      at = end - text.c_str();
      return Json(number);
    }

    std::string string() {
      demand("\"");
      std::string result;
      while (at < text.size() && text[at] != '"') {
        result += text[at] == '\\' ? escaped() : text[at++];
      }
      demand("\"");
      return result;
    }

    char escaped() {
      static const std::map<char, char> plain = {
          {'"', '"'}, {'\\', '\\'}, {'/', '/'}, {'b', '\b'}, {'f', '\f'}, {'n', '\n'}, {'r', '\r'}, {'t', '\t'}};
      const char kind = at + 1 < text.size() ? text[at + 1] : '\0';
      at += 2;
      if (kind == 'u' && text.compare(at, 2, "00") == 0) {  // the other control characters
        at += 4;
        return static_cast<char>(std::strtol(text.substr(at - 2, 2).c_str(), nullptr, 16));
      }
      const auto found = plain.find(kind);
      if (found == plain.end()) {
        fail("another escape");
      }
      return found->second;
    }
  };

  template <typename Value>
  explicit Json(Value value) : value_(std::move(value)) {}

  template <typename Value>
  const Value& as(const char* expected) const {
    if (const Value* value = std::get_if<Value>(&value_)) {
      return *value;
    }
    throw std::runtime_error(std::string("manifest: must have ") + expected + " where it has another value.");
  }

  std::variant<std::nullptr_t, bool, double, std::string, List, Object> value_;
};
