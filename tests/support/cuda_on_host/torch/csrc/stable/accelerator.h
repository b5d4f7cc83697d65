// Stands before torch's header of this name when CUDA sources are compiled for the host: there is no device to select.
#pragma once

#include <torch/csrc/stable/c/shim.h>

#define aoti_torch_create_device_guard(index, guard) (static_cast<void>(index), static_cast<void>(*(guard) = nullptr), 0)
#include_next <torch/csrc/stable/accelerator.h>
