// A command's words, read in order; and the errors that they may have.
#pragma once

#include <cctype>
#include <charconv>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "module_api.h"

namespace engine {

// Becomes the reply "-text". The server's own errors begin with "ERR ", torch's have no prefix.
struct CommandError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The server words this one.
struct ArityError {};

inline constexpr const char* kWrongType =
    "WRONGTYPE Operation against a key holding the wrong kind of value";

// The text as one line, as a reply must be.
inline std::string one_line(std::string text) {
  for (char& each : text) {
    if (each == '\n' || each == '\r') each = ' ';
  }
  return text.substr(0, text.find('\0'));
}

inline std::string_view text_of(const server::String* word) {
  size_t length = 0;
  const char* start = server::StringPtrLen(word, &length);
  return {start, length};
}

// Up to its first NUL, where text ends for a script.
inline std::string c_string_of(const server::String* word) {
  const std::string_view text = text_of(word);
  return std::string(text.substr(0, text.find('\0')));
}

inline bool same_word(std::string_view word, std::string_view keyword) {
  if (word.size() != keyword.size()) return false;
  for (size_t i = 0; i < word.size(); ++i) {
    if (std::toupper(static_cast<unsigned char>(word[i])) !=
        std::toupper(static_cast<unsigned char>(keyword[i]))) {
      return false;
    }
  }
  return true;
}

// A word of the engine's own making, for as long as it is there.
class Word {
 public:
  Word(server::Context* context, std::string_view text)
      : context_(context), string_(server::CreateString(context, text.data(), text.size())) {}
  ~Word() { server::FreeString(context_, string_); }
  Word(const Word&) = delete;
  Word& operator=(const Word&) = delete;
  server::String* get() const { return string_; }

 private:
  server::Context* context_;
  server::String* string_;
};

// Several of them.
class Words {
 public:
  template <typename Texts>
  Words(server::Context* context, const Texts& texts) : context_(context) {
    for (const auto& text : texts) {
      const std::string_view view = text;
      strings_.push_back(server::CreateString(context, view.data(), view.size()));
    }
  }
  ~Words() {
    for (server::String* string : strings_) server::FreeString(context_, string);
  }
  Words(const Words&) = delete;
  Words& operator=(const Words&) = delete;
  server::String** all() { return strings_.data(); }
  size_t count() const { return strings_.size(); }

 private:
  server::Context* context_;
  std::vector<server::String*> strings_;
};

// A decimal int64, all of the word.
inline std::optional<int64_t> integer_of(std::string_view word) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), value);
  if (error != std::errc() || end != word.data() + word.size()) return std::nullopt;
  return value;
}

class Arguments {
 public:
  Arguments(server::String** words, int count) : words_(words), end_(words + count) {}

  size_t left() const { return static_cast<size_t>(end_ - words_); }
  bool empty() const { return words_ == end_; }
  server::String* next() { return *words_++; }
  std::string_view peek() const { return text_of(*words_); }

  // Takes the next word if it is the keyword.
  bool accept(std::string_view keyword) {
    if (empty() || !same_word(peek(), keyword)) return false;
    ++words_;
    return true;
  }

  // The next `count` words, as their own arguments.
  Arguments take(size_t count) {
    Arguments taken(words_, static_cast<int>(count));
    words_ += count;
    return taken;
  }

 private:
  server::String** words_;
  server::String** end_;
};

}  // namespace engine
