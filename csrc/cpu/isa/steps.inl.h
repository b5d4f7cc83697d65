// The second part of kernels.inl.h: one token on columns of a state.

// --- erase and write ---

template <class V, int COLS>
static void step_block(ScalarOf<V>* state, int64_t ld, const ScalarOf<V>* k, const ScalarOf<V>* q, const ScalarOf<V>* v,
                       ScalarOf<V> decay, ScalarOf<V> beta, ScalarOf<V> qk, ScalarOf<V>* o, int k_dim) {
  typename V::Reg read[COLS], seen[COLS];
#pragma GCC unroll 8
  for (int j = 0; j < COLS; ++j) read[j] = seen[j] = V::zero();
  for (int i = 0; i < k_dim; ++i) {
    const auto k_i = V::broadcast(k[i]), q_i = V::broadcast(q[i]);
#pragma GCC unroll 8
    for (int j = 0; j < COLS; ++j) {
      const auto s = V::load(state + i * ld + j * V::lanes);
      read[j] = V::fma(k_i, s, read[j]);
      seen[j] = V::fma(q_i, s, seen[j]);
    }
  }
  const auto wide_decay = V::broadcast(decay), wide_beta = V::broadcast(beta), wide_qk = V::broadcast(qk);
#pragma GCC unroll 8
  for (int j = 0; j < COLS; ++j) {
    read[j] = V::mul(wide_beta, V::fnma(wide_decay, read[j], V::load(v + j * V::lanes)));
    V::store(o + j * V::lanes, V::fma(wide_decay, seen[j], V::mul(wide_qk, read[j])));
  }
  for (int i = k_dim - 1; i >= 0; --i) {  // backwards: the rows read last are still in L1
    const auto k_i = V::broadcast(k[i]);
#pragma GCC unroll 8
    for (int j = 0; j < COLS; ++j) {
      ScalarOf<V>* s = state + i * ld + j * V::lanes;
      V::store(s, V::fma(k_i, read[j], V::mul(wide_decay, V::load(s))));
    }
  }
}

template <class S>
static void step_single_column(S* state, int64_t ld, const S* k, const S* q, S v, S decay, S beta, S qk, S* o,
                               int k_dim) {
  S read = 0, seen = 0;
  for (int i = 0; i < k_dim; ++i) {
    read += k[i] * state[i * ld];
    seen += q[i] * state[i * ld];
  }
  const S update = beta * (v - decay * read);
  *o = decay * seen + qk * update;
  for (int i = 0; i < k_dim; ++i) state[i * ld] = k[i] * update + decay * state[i * ld];
}

template <class V, int COLS>
static void step_columns(ScalarOf<V>* state, int64_t ld, const ScalarOf<V>* k, const ScalarOf<V>* q,
                         const ScalarOf<V>* v, ScalarOf<V> decay, ScalarOf<V> beta, ScalarOf<V>* o, int k_dim,
                         int cols) {
  ScalarOf<V> qk = 0;
  for (int i = 0; i < k_dim; ++i) qk += q[i] * k[i];
  int j = 0;
  for (; j + COLS * V::lanes <= cols; j += COLS * V::lanes) {
    step_block<V, COLS>(state + j, ld, k, q, v + j, decay, beta, qk, o + j, k_dim);
  }
  for (; j + V::lanes <= cols; j += V::lanes)
    step_block<V, 1>(state + j, ld, k, q, v + j, decay, beta, qk, o + j, k_dim);
  for (; j < cols; ++j) step_single_column(state + j, ld, k, q, v[j], decay, beta, qk, o + j, k_dim);
}

// --- write only ---

template <class V, int COLS>
static void write_block(ScalarOf<V>* state, int64_t ld, const ScalarOf<V>* k, const ScalarOf<V>* q,
                        const ScalarOf<V>* v, ScalarOf<V> decay, ScalarOf<V>* o, int k_dim) {
  typename V::Reg value[COLS], seen[COLS];
#pragma GCC unroll 8
  for (int j = 0; j < COLS; ++j) {
    value[j] = V::load(v + j * V::lanes);
    seen[j] = V::zero();
  }
  const auto wide_decay = V::broadcast(decay);
  for (int i = 0; i < k_dim; ++i) {
    const auto k_i = V::broadcast(k[i]), q_i = V::broadcast(q[i]);
#pragma GCC unroll 8
    for (int j = 0; j < COLS; ++j) {
      ScalarOf<V>* to = state + i * ld + j * V::lanes;
      const auto s = V::fma(k_i, value[j], V::mul(wide_decay, V::load(to)));
      V::store(to, s);
      seen[j] = V::fma(q_i, s, seen[j]);
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < COLS; ++j) V::store(o + j * V::lanes, seen[j]);
}

template <class S>
static void write_single_column(S* state, int64_t ld, const S* k, const S* q, S v, S decay, S* o, int k_dim) {
  S seen = 0;
  for (int i = 0; i < k_dim; ++i) {
    const S s = k[i] * v + decay * state[i * ld];
    state[i * ld] = s;
    seen += q[i] * s;
  }
  *o = seen;
}

template <class V, int COLS>
static void write_columns(ScalarOf<V>* state, int64_t ld, const ScalarOf<V>* k, const ScalarOf<V>* q,
                          const ScalarOf<V>* v, ScalarOf<V> decay, ScalarOf<V>* o, int k_dim, int cols) {
  int j = 0;
  for (; j + COLS * V::lanes <= cols; j += COLS * V::lanes)
    write_block<V, COLS>(state + j, ld, k, q, v + j, decay, o + j, k_dim);
  for (; j + V::lanes <= cols; j += V::lanes) write_block<V, 1>(state + j, ld, k, q, v + j, decay, o + j, k_dim);
  for (; j < cols; ++j) write_single_column(state + j, ld, k, q, v[j], decay, o + j, k_dim);
}
