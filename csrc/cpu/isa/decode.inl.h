// Few query rows against a cache: the cache is read once, in its stored type and in the order it lies in memory, which
// is what bounds a decode step. Part of kernels.inl.h.

// Rows ahead of those at work that are asked for: the processor's own prefetcher stops at every page.
inline constexpr int kRowsAhead = 16;

template <class Item>
static inline void prefetch_row(const Item* row, int dim) {
  for (int d = 0; d < dim; d += 64 / static_cast<int>(sizeof(Item))) __builtin_prefetch(row + d);
}

// Scores of one query row with V::lanes key rows, whose sums lie in a vector.
template <class V, class Stored>
static inline typename V::Reg score_block(const ScalarOf<V>* q, const typename Stored::Item* const* keys, int whole) {
  typename V::Reg sum[V::lanes];
#pragma GCC unroll 16
  for (int j = 0; j < V::lanes; ++j) sum[j] = V::zero();
  for (int d = 0; d < whole; d += V::lanes) {
    const auto q_d = V::load(q + d);
#pragma GCC unroll 16
    for (int j = 0; j < V::lanes; ++j) sum[j] = V::fma(Stored::load(keys[j] + d), q_d, sum[j]);
  }
  V::transpose(sum);
#pragma GCC unroll 4
  for (int half = V::lanes / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int j = 0; j < half; ++j) sum[j] = V::add(sum[j], sum[j + half]);
  }
  return sum[0];
}

// Blocks of V::lanes keys; the last one repeats its last key, so that bits do not depend on where a block begins.
template <class V, class Stored>
static void score_keys_as(ScalarOf<V>* s, int lds, const ScalarOf<V>* q, int ldq, const void* keys, int64_t stride,
                          int count, int heads, int queries, int dim) {
  using Item = typename Stored::Item;
  const int whole = dim / V::lanes * V::lanes;
  for (int from = 0; from < count; from += V::lanes) {
    const int n = count - from < V::lanes ? count - from : V::lanes;
    for (int h = 0; h < heads; ++h) {
      const Item* rows[V::lanes];
      for (int j = 0; j < V::lanes; ++j) {
        rows[j] = static_cast<const Item*>(keys) + (from + (j < n ? j : n - 1)) * stride + int64_t{h} * dim;
        prefetch_row(rows[j] + kRowsAhead * stride, dim);
      }
      for (int row = h * queries; row < (h + 1) * queries; ++row) {
        const ScalarOf<V>* query = q + int64_t{row} * ldq;
        const auto block = score_block<V, Stored>(query, rows, whole);
        if (n == V::lanes && whole == dim) {
          V::store(s + int64_t{row} * lds + from, block);
          continue;
        }
        ScalarOf<V> scores[V::lanes];
        V::store(scores, block);
        for (int j = 0; j < n; ++j) {
          for (int d = whole; d < dim; ++d) scores[j] += query[d] * Stored::load_one(rows[j] + d);
          s[int64_t{row} * lds + from + j] = scores[j];
        }
      }
    }
  }
}

// o [queries, dim] += p [queries, KEYS] times KEYS value rows of one head, in ascending order.
template <class V, class Stored, int KEYS>
static inline void weigh_block(ScalarOf<V>* o, int ldo, const ScalarOf<V>* p, int ldp,
                               const typename Stored::Item* value, int64_t stride, int queries, int dim) {
  const int whole = dim / V::lanes * V::lanes;
  for (int d = 0; d < whole; d += V::lanes) {
    typename V::Reg v[KEYS];
#pragma GCC unroll 4
    for (int j = 0; j < KEYS; ++j) v[j] = Stored::load(value + j * stride + d);
    for (int m = 0; m < queries; ++m) {
      ScalarOf<V>* to = o + int64_t{m} * ldo + d;
      auto sum = V::load(to);
#pragma GCC unroll 4
      for (int j = 0; j < KEYS; ++j) sum = V::fma(V::broadcast(p[int64_t{m} * ldp + j]), v[j], sum);
      V::store(to, sum);
    }
  }
  for (int d = whole; d < dim; ++d) {
    for (int m = 0; m < queries; ++m) {
      for (int j = 0; j < KEYS; ++j) {
        o[int64_t{m} * ldo + d] += p[int64_t{m} * ldp + j] * Stored::load_one(value + j * stride + d);
      }
    }
  }
}

template <class V, class Stored>
static void weigh_values_as(ScalarOf<V>* o, int ldo, const ScalarOf<V>* p, int ldp, const void* values, int64_t stride,
                            int count, int heads, int queries, int dim) {
  constexpr int block = 4;
  const typename Stored::Item* from = static_cast<const typename Stored::Item*>(values);
  const int whole = count / block * block;
  for (int j = 0; j < count; j += j < whole ? block : 1) {
    for (int h = 0; h < heads; ++h) {
      for (int i = 0; i < (j < whole ? block : 1); ++i) {
        prefetch_row(from + (j + i + kRowsAhead) * stride + int64_t{h} * dim, dim);
      }
      ScalarOf<V>* to = o + int64_t{h} * queries * ldo;
      const ScalarOf<V>* weights = p + int64_t{h} * queries * ldp + j;
      const typename Stored::Item* value = from + j * stride + int64_t{h} * dim;
      if (j < whole) {
        weigh_block<V, Stored, block>(to, ldo, weights, ldp, value, stride, queries, dim);
      } else {
        weigh_block<V, Stored, 1>(to, ldo, weights, ldp, value, stride, queries, dim);
      }
    }
  }
}

template <class V>
static void score_keys(ScalarOf<V>* s, int lds, const ScalarOf<V>* q, int ldq, const void* keys, Element type,
                       int64_t stride, int count, int heads, int queries, int dim) {
  if constexpr (sizeof(ScalarOf<V>) == 8) {
    score_keys_as<V, StoredSame<V>>(s, lds, q, ldq, keys, stride, count, heads, queries, dim);
  } else if (type == Element::bf16) {
    score_keys_as<V, StoredBf16<V>>(s, lds, q, ldq, keys, stride, count, heads, queries, dim);
  } else if (type == Element::f16) {
    score_keys_as<V, StoredF16<V>>(s, lds, q, ldq, keys, stride, count, heads, queries, dim);
  } else {
    score_keys_as<V, StoredSame<V>>(s, lds, q, ldq, keys, stride, count, heads, queries, dim);
  }
}

template <class V>
static void weigh_values(ScalarOf<V>* o, int ldo, const ScalarOf<V>* p, int ldp, const void* values, Element type,
                         int64_t stride, int count, int heads, int queries, int dim) {
  if constexpr (sizeof(ScalarOf<V>) == 8) {
    weigh_values_as<V, StoredSame<V>>(o, ldo, p, ldp, values, stride, count, heads, queries, dim);
  } else if (type == Element::bf16) {
    weigh_values_as<V, StoredBf16<V>>(o, ldo, p, ldp, values, stride, count, heads, queries, dim);
  } else if (type == Element::f16) {
    weigh_values_as<V, StoredF16<V>>(o, ldo, p, ldp, values, stride, count, heads, queries, dim);
  } else {
    weigh_values_as<V, StoredSame<V>>(o, ldo, p, ldp, values, stride, count, heads, queries, dim);
  }
}
