// One source, several instruction sets.
//
// Every file under csrc/cpu is compiled once per instruction set with -DBDFAST_ISA=baseline|avx2|avx512, and everything
// it defines, templates and inline helpers included, lives in `bdfast::BDFAST_ISA_NAMESPACE`. Without that namespace the
// linker would keep one copy of each inline function, perhaps the AVX-512 one, and baseline code would call it.
// The CUDA compiler includes the same headers as `isa_cuda`.
#pragma once

#ifndef BDFAST_ISA
#ifdef __CUDACC__
#define BDFAST_ISA cuda
#else
#define BDFAST_ISA baseline
#endif
#endif

#define BDFAST_PASTE_(a, b) a##b
#define BDFAST_PASTE(a, b) BDFAST_PASTE_(a, b)
#define BDFAST_ISA_NAMESPACE BDFAST_PASTE(isa_, BDFAST_ISA)

#ifdef __CUDACC__
#define BDFAST_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define BDFAST_HOST_DEVICE inline
#endif

// For a function whose copies could differ: where two products are added, a compiler may fuse either with the sum, and
// chooses anew where it inlines, such as in the loop for one thread and in that for several.
#if defined(__GNUC__)
#define BDFAST_ONE_COPY __attribute__((noinline))
#else
#define BDFAST_ONE_COPY
#endif

// A CPU kernel is declared once here for all variants, and called through `BDFAST_CALL_BEST`.
#ifdef BDFAST_X86_ISAS
#define BDFAST_DECLARE_CPU_KERNEL(signature) \
  namespace isa_baseline {                   \
  signature;                                 \
  }                                          \
  namespace isa_avx2 {                       \
  signature;                                 \
  }                                          \
  namespace isa_avx512 {                     \
  signature;                                 \
  }
#define BDFAST_CALL_BEST(function, ...)                                              \
  (::bdfast::best_isa() == ::bdfast::Isa::avx512 ? isa_avx512::function(__VA_ARGS__) \
   : ::bdfast::best_isa() == ::bdfast::Isa::avx2 ? isa_avx2::function(__VA_ARGS__)   \
                                                 : isa_baseline::function(__VA_ARGS__))
#else
#define BDFAST_DECLARE_CPU_KERNEL(signature) \
  namespace isa_baseline {                   \
  signature;                                 \
  }
#define BDFAST_CALL_BEST(function, ...) isa_baseline::function(__VA_ARGS__)
#endif

namespace bdfast {

enum class Isa { baseline, avx2, avx512 };

Isa best_isa();  // what this processor runs, unless BDFAST_ISA_MAX=baseline|avx2 caps it
const char* isa_name(Isa);

}  // namespace bdfast
