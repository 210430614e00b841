#include <ATen/cuda/CUDAContext.h>
#include <cuda_fp16.h>
#include <cudnn.h>
#include <torch/extension.h>

namespace {
// nvcc renames the symbols of an unnamed namespace in each compile, unless it gets a seed.
__global__ void multiply(float* values, float factor, long count) {
    long place = blockIdx.x * static_cast<long>(blockDim.x) + threadIdx.x;
    // A function of a header is inlined here: with -lineinfo the device code names the header, and its time.
    if (place < count) values[place] = __half2float(__hmul(__float2half(values[place]), __float2half(factor)));
}
}  // namespace

at::Tensor scale(const at::Tensor& values, double factor) {
    auto result = values.clone();
    long count = result.numel();
    multiply<<<(count + 255) / 256, 256, 0, at::cuda::getCurrentCUDAStream()>>>(
        result.data_ptr<float>(), static_cast<float>(factor), count);
    TORCH_CHECK(cudaGetLastError() == cudaSuccess, __FILE__, " failed");
    return result;
}
