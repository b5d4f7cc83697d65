// The row primitives of attention: the step of an online softmax, and P and dS from scores. Part of kernels.inl.h.

template <class V>
static inline typename V::Reg biased_score(const ScalarOf<V>* s, typename V::Reg scale, PairBias<ScalarOf<V>> bias,
                                           int i, int j) {
  const auto product = V::mul(scale, V::load(s + j));
  if (!bias.row_high) return product;
  const auto high = V::sub(V::broadcast(bias.row_high[i]), V::load(bias.key_high + j));
  const auto low = V::sub(V::broadcast(bias.row_low[i]), V::load(bias.key_low + j));
  return V::add(product, V::add(high, low));
}

template <class V>
static inline ScalarOf<V> first_lane(typename V::Reg x) {
  ScalarOf<V> lanes[V::lanes];
  V::store(lanes, x);
  return lanes[0];
}

template <class V>
static void softmax_rows(ScalarOf<V>* s, int ld, ScalarOf<V> scale, PairBias<ScalarOf<V>> bias, ScalarOf<V>* most,
                         ScalarOf<V>* sum, ScalarOf<V>* shrink, int rows, int width) {
  constexpr auto nothing_seen = -static_cast<ScalarOf<V>>(INFINITY);
  const auto wide_scale = V::broadcast(scale);
  for (int i = 0; i < rows; ++i) {
    ScalarOf<V>* row = s + int64_t{i} * ld;
    auto top = V::broadcast(nothing_seen);
    for (int j = 0; j < width; j += V::lanes) {
      const auto x = biased_score<V>(row, wide_scale, bias, i, j);
      V::store(row + j, x);
      top = V::max(x, top);
    }
    const ScalarOf<V> before = most[i], candidate = V::largest(top);
    if (candidate > before) most[i] = candidate;
    const ScalarOf<V> base = most[i] == nothing_seen ? 0 : most[i];
    const auto wide_base = V::broadcast(base);
    auto total = V::zero();
    for (int j = 0; j < width; j += V::lanes) {
      const auto p = V::exp(V::sub(V::load(row + j), wide_base));
      V::store(row + j, p);
      total = V::add(total, p);
    }
    shrink[i] = before == most[i] ? ScalarOf<V>(1) : first_lane<V>(V::exp(V::broadcast(before - base)));
    sum[i] = shrink[i] * sum[i] + V::sum(total);
  }
}

template <class V>
static void softmax_rows_backward(ScalarOf<V>* s, ScalarOf<V>* dp, int ld, ScalarOf<V> scale,
                                  PairBias<ScalarOf<V>> bias, const ScalarOf<V>* lse, const ScalarOf<V>* delta,
                                  int rows, int width) {
  const auto wide_scale = V::broadcast(scale);
  for (int i = 0; i < rows; ++i) {
    ScalarOf<V>*row = s + int64_t{i} * ld, *gradient = dp + int64_t{i} * ld;
    const auto wide_lse = V::broadcast(lse[i]), wide_delta = V::broadcast(delta[i]);
    for (int j = 0; j < width; j += V::lanes) {
      const auto p = V::exp(V::sub(biased_score<V>(row, wide_scale, bias, i, j), wide_lse));
      V::store(row + j, p);
      V::store(gradient + j, V::mul(p, V::sub(V::load(gradient + j), wide_delta)));
    }
  }
}
