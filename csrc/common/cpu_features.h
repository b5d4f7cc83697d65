// Which instruction-set tables this processor can run, and which one is in use. Torch-free and header-only: the ops
// include it to choose their table, the host module to tell Python.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#define MEMATTN_X86 1
#include <cpuid.h>
#endif
#if defined(MEMATTN_X86) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace memattn {

// Ordered from the most general to the most specific: each table needs everything the ones before it need.
enum class Isa { portable, avx2, avx512, avx512_bf16, amx };

inline constexpr const char* kIsaNames[] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};

inline const char* isa_name(Isa isa) { return kIsaNames[static_cast<int>(isa)]; }

namespace cpu_features_detail {

#if defined(MEMATTN_X86)
inline bool cpuid7_bit(unsigned subleaf, int reg, unsigned bit) {
  unsigned r[4] = {0, 0, 0, 0};
  if (!__get_cpuid_count(7, subleaf, &r[0], &r[1], &r[2], &r[3])) return false;
  return (r[reg] >> bit) & 1u;
}

// The kernel hands out the 8 KiB tile state only to a process that asks for it.
inline bool request_amx_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

inline Isa detect() {
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))) return Isa::portable;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !((c >> 29) & 1u)) return Isa::portable;  // f16c
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!avx512) return Isa::avx2;
  if (!cpuid7_bit(1, 0, 5)) return Isa::avx512;                     // avx512_bf16: leaf 7.1 eax bit 5
  const bool tiles = cpuid7_bit(0, 3, 24) && cpuid7_bit(0, 3, 22);  // amx-tile, amx-bf16: leaf 7.0 edx
  return tiles && request_amx_tiles() ? Isa::amx : Isa::avx512_bf16;
}
#else
inline Isa detect() { return Isa::portable; }
#endif

}  // namespace cpu_features_detail

inline Isa best_isa() {
  static const Isa best = cpu_features_detail::detect();
  return best;
}

inline std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (int i = 0; i <= static_cast<int>(best_isa()); ++i) names.emplace_back(kIsaNames[i]);
  return names;
}

// The best table, or the one that MEMATTN_CPU_ISA names; throws if that one is unknown or cannot run here.
inline Isa choose_isa() {
  const char* forced = std::getenv("MEMATTN_CPU_ISA");
  if (forced == nullptr || *forced == '\0') return best_isa();
  std::string available;
  for (int i = 0; i <= static_cast<int>(best_isa()); ++i) {
    if (std::string(forced) == kIsaNames[i]) return static_cast<Isa>(i);
    available += (i == 0 ? "" : ", ") + std::string(kIsaNames[i]);
  }
  throw std::runtime_error("MEMATTN_CPU_ISA=" + std::string(forced) +
                           " cannot be used on this processor; available here: " + available);
}

inline std::string selected_isa() { return isa_name(choose_isa()); }

}  // namespace memattn
