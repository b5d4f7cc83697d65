#include "primitives.h"
namespace memattn::cpu {
constinit const Primitives<float> avx2_f32{};
}
