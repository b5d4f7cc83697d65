#include "primitives.h"
namespace memattn::cpu {
constinit const Primitives<bf16> amx_bf16{};
}
