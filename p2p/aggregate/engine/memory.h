// Where the bytes of tensors live: the server's own allocator, so that they are in `used_memory`.
//
// All of torch's CPU memory in this process comes from here. Blocks are aligned for vector
// instructions. Large ones are kept for a while after they are freed: a model's tensors are made
// anew at each step with the same sizes, and to get pages from the kernel each time takes longer
// than to fill them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace engine::memory {

struct Limits {
  size_t all_bytes;   // tensors that would go beyond it are refused with an error
  size_t kept_bytes;  // of freed blocks
};

// Makes torch allocate here.
void install(Limits limits);

// Bytes of living tensors, and of freed blocks that are kept.
size_t used_bytes();
size_t kept_bytes();

// Throws c10::Error when this process has outgrown the limit in any way, tensors or not.
void check_process();

}  // namespace engine::memory
