// Few query rows against a cache: the cache is read once, in its stored type and in the order it lies in memory, which
// is what bounds a decode step. Part of kernels.inl.h.

// One key row with QUERIES query rows; the sums are `lds` apart.
template <class V, class Stored, int QUERIES>
static inline void score_block(ScalarOf<V>* s, int lds, const ScalarOf<V>* q, int ldq,
                               const typename Stored::Item* key, int dim) {
  const int whole = dim / V::lanes * V::lanes;
  typename V::Reg sum[QUERIES];
#pragma GCC unroll 4
  for (int m = 0; m < QUERIES; ++m) sum[m] = V::zero();
  for (int d = 0; d < whole; d += V::lanes) {
    const auto k = Stored::load(key + d);
#pragma GCC unroll 4
    for (int m = 0; m < QUERIES; ++m) sum[m] = V::fma(k, V::load(q + int64_t{m} * ldq + d), sum[m]);
  }
#pragma GCC unroll 4
  for (int m = 0; m < QUERIES; ++m) {
    ScalarOf<V> score = V::sum(sum[m]);
    for (int d = whole; d < dim; ++d) score += q[int64_t{m} * ldq + d] * Stored::load_one(key + d);
    s[int64_t{m} * lds] = score;
  }
}

template <class V, class Stored>
static void score_keys_as(ScalarOf<V>* s, int lds, const ScalarOf<V>* q, int ldq, const void* keys, int64_t stride,
                          int count, int heads, int queries, int dim) {
  constexpr int block = 4;
  for (int j = 0; j < count; ++j) {
    const typename Stored::Item* key = static_cast<const typename Stored::Item*>(keys) + j * stride;
    for (int h = 0; h < heads; ++h, key += dim) {
      int row = h * queries;
      const int end = row + queries;
      for (; row + block <= end; row += block) {
        score_block<V, Stored, block>(s + int64_t{row} * lds + j, lds, q + int64_t{row} * ldq, ldq, key, dim);
      }
      for (; row < end; ++row) {
        score_block<V, Stored, 1>(s + int64_t{row} * lds + j, lds, q + int64_t{row} * ldq, ldq, key, dim);
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
