// Where events begin in a text: at surprising tokens, moved to where two communities of keys part.
//
//   t begins an event if z_t > μ_t + γ σ_t and the open event has min_size tokens, or if it has max_size of them
//
// with μ_t, σ_t the mean and the standard deviation of the last `window` surprises before t. The equations of the
// refinement and their sources: ops/segment_events.py. What is found does not depend on where a text is cut into calls.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

namespace memattn {
namespace {

enum class Refine : int64_t { no, modularity, conductance };

struct EventSettings {
  int64_t window;
  double gamma;
  int64_t min_size, max_size;
  Refine refine;
};

// What a text has told so far.
struct EventProgress {
  int64_t begin = 0;  // of the open event
  int64_t next = 0;   // token to be judged
  // Of the surprises in the window before `next`: sums of z - shift and of its square. Small, whatever z's size.
  double shift = 0, sum = 0, squares = 0;
};

// A part of a text: positions first..end of rows of `width` values. What lies before position 0 is never read.
template <class T>
struct Span {
  const T* data;
  int64_t first, width;
  const T* at(int64_t position) const { return data + (position - first) * width; }
};

// How tokens relate: keys, whose similarity is the dot product, or a matrix of similarities of a whole text.
struct TokenGraph {
  Span<float> keys32{};
  Span<double> keys64{};
  Span<double> matrix{};
};

constexpr double kRounding = 1e-12;  // differences below it, relative to what is compared, are none

// --- surprise ---------------------------------------------------------------------------------------------------------

bool surprising(const EventSettings& s, const EventProgress& p, double z) {
  const auto count = static_cast<double>(std::min(p.next, s.window));
  if (count < 2) return false;
  const double mean = p.shift + p.sum / count;
  const double variance = std::max(0.0, (p.squares - p.sum * p.sum / count) / (count - 1));
  const double noise = kRounding * (std::abs(p.shift) + std::abs(mean) + std::abs(z));
  return z - mean > s.gamma * std::sqrt(variance) + noise;
}

// The window before p.next, summed up afresh.
void sum_up(const EventSettings& s, EventProgress& p, const Span<double>& surprise) {
  const int64_t first = std::max<int64_t>(0, p.next - s.window);
  double total = 0;
  for (int64_t t = first; t < p.next; ++t) total += *surprise.at(t);
  p.shift = total / static_cast<double>(p.next - first);
  p.sum = p.squares = 0;
  for (int64_t t = first; t < p.next; ++t) {
    const double z = *surprise.at(t) - p.shift;
    p.sum += z;
    p.squares += z * z;
  }
}

// Token p.next has been judged and enters the window. At multiples of its length the sums start afresh, so that their
// rounding does not grow with the text and depends on positions alone.
void step(const EventSettings& s, EventProgress& p, const Span<double>& surprise) {
  if (p.next == 0) p.shift = *surprise.at(0);
  const double in = *surprise.at(p.next) - p.shift;
  p.sum += in;
  p.squares += in * in;
  if (p.next >= s.window) {
    const double out = *surprise.at(p.next - s.window) - p.shift;
    p.sum -= out;
    p.squares -= out * out;
  }
  ++p.next;
  if (p.next % s.window == 0) sum_up(s, p, surprise);
}

// --- refinement -------------------------------------------------------------------------------------------------------

// Tokens first..end in two communities; token after token moves from the right one to the left one.
struct Split {
  double inner_left, cut, inner_right;  // sums of similarities inside and between them
};

// How well a split parts the graph; the larger the better, -inf where that has no meaning.
double quality(const Split& s, Refine refine) {
  constexpr double none = -std::numeric_limits<double>::infinity();
  const double left = s.inner_left + s.cut, right = s.inner_right + s.cut, total = left + right;
  if (refine == Refine::conductance) {
    const double least = std::min(left, right);
    return least > 0 ? -s.cut / least : none;
  }
  return total > 0 ? (s.inner_left + s.inner_right) / total - (left * left + right * right) / (total * total) : none;
}

// Similarity is the dot product: the sum over all pairs of two sets is the product of their sums.
template <class T>
class KeySplits {
 public:
  KeySplits(const Span<T>& keys, int64_t first, int64_t end) : keys_(keys), left_(keys.width), right_(keys.width) {
    for (int64_t t = first; t < end; ++t) {
      for (int64_t c = 0; c < keys.width; ++c) right_[c] += keys.at(t)[c];
    }
  }
  void move(int64_t token) {
    const T* key = keys_.at(token);
    for (int64_t c = 0; c < keys_.width; ++c) {
      left_[c] += key[c];
      right_[c] -= key[c];
    }
  }
  Split split() const {
    Split s{};
    for (int64_t c = 0; c < keys_.width; ++c) {
      s.inner_left += left_[c] * left_[c];
      s.cut += left_[c] * right_[c];
      s.inner_right += right_[c] * right_[c];
    }
    return s;
  }

 private:
  const Span<T> keys_;
  std::vector<double> left_, right_;
};

// Similarities of both directions count half each. Row sums make every split O(1) after one pass over the pairs.
class MatrixSplits {
 public:
  MatrixSplits(const Span<double>& matrix, int64_t first, int64_t end) : matrix_(matrix), first_(first), end_(end) {
    for (int64_t i = first; i < end; ++i) total_ += degree(i, end);
  }
  void move(int64_t token) {
    inner_ += 2 * degree(token, token) + matrix_.at(token)[token];
    left_ += degree(token, end_);
  }
  Split split() const {
    const double cut = left_ - inner_;
    return {inner_, cut, total_ - left_ - cut};
  }

 private:
  // To tokens first_..end.
  double degree(int64_t token, int64_t end) const {
    double sum = 0;
    for (int64_t j = first_; j < end; ++j) sum += (matrix_.at(token)[j] + matrix_.at(j)[token]) / 2;
    return sum;
  }

  const Span<double> matrix_;
  const int64_t first_, end_;
  double total_ = 0, inner_ = 0, left_ = 0;
};

// The best place in begin + min_size..proposed for a boundary, the last of equally good ones.
template <class Splits>
int64_t best_split(Splits splits, const EventSettings& s, int64_t first, int64_t begin, int64_t proposed) {
  double best = -std::numeric_limits<double>::infinity();
  int64_t place = proposed;
  for (int64_t t = first; t < begin + s.min_size; ++t) splits.move(t);
  for (int64_t t = begin + s.min_size;; splits.move(t++)) {
    const double value = quality(splits.split(), s.refine);
    if (value >= best - kRounding || value == best) place = t;
    best = std::max(best, value);
    if (t == proposed) return place;
  }
}

int64_t refined(const EventSettings& s, const TokenGraph& graph, int64_t begin, int64_t proposed, int64_t end) {
  const int64_t around = (proposed - begin) / 2, first = std::max<int64_t>(0, begin - around);
  const int64_t last = std::min(end, proposed + around);
  if (graph.matrix.data) return best_split(MatrixSplits(graph.matrix, first, last), s, first, begin, proposed);
  if (graph.keys64.data) return best_split(KeySplits<double>(graph.keys64, first, last), s, first, begin, proposed);
  return best_split(KeySplits<float>(graph.keys32, first, last), s, first, begin, proposed);
}

// Judges the tokens up to `end` and returns the positions where events begin, in order. Unless the text is over there,
// a boundary whose surroundings are not complete is left for the next call.
std::vector<int64_t> find_events(const EventSettings& s, EventProgress& p, const Span<double>& surprise,
                                 const TokenGraph& graph, int64_t end, bool over) {
  std::vector<int64_t> begins;
  for (; p.next < end; step(s, p, surprise)) {
    const int64_t size = p.next - p.begin;
    if (size >= s.min_size && surprising(s, p, *surprise.at(p.next))) {
      if (s.refine != Refine::no && !over && p.next + size / 2 > end) break;
      p.begin = s.refine == Refine::no ? p.next : refined(s, graph, p.begin, p.next, end);
    } else if (size == s.max_size) {
      p.begin = p.next;
    } else {
      continue;
    }
    begins.push_back(p.begin);
  }
  return begins;
}

// --- from Python ------------------------------------------------------------------------------------------------------

using Progress = std::tuple<int64_t, int64_t, double, double, double>;

template <class T>
Span<T> span(uintptr_t address, int64_t first, int64_t width) {
  return {reinterpret_cast<const T*>(address), first, width};
}

std::pair<std::vector<int64_t>, Progress> segment_events(
    const Progress& progress, uintptr_t surprise, int64_t first, uintptr_t keys32, uintptr_t keys64,
    int64_t first_key, int64_t width, uintptr_t matrix, int64_t end, bool over, int64_t window, double gamma,
    int64_t min_size, int64_t max_size, int64_t refine) {
  EventProgress p;
  std::tie(p.begin, p.next, p.shift, p.sum, p.squares) = progress;
  const TokenGraph graph{span<float>(keys32, first_key, width), span<double>(keys64, first_key, width),
                         span<double>(matrix, 0, end)};
  const EventSettings settings{window, gamma, min_size, max_size, static_cast<Refine>(refine)};
  std::vector<int64_t> begins = find_events(settings, p, span<double>(surprise, first, 1), graph, end, over);
  return {std::move(begins), {p.begin, p.next, p.shift, p.sum, p.squares}};
}

}  // namespace

void bind_segment_events(pybind11::module_& m) {
  m.def("segment_events", &segment_events, pybind11::call_guard<pybind11::gil_scoped_release>(),
        "(positions where events begin, progress), from addresses of float64 surprises and of keys or similarities.");
}

}  // namespace memattn
