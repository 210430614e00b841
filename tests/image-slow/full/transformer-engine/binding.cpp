#include <torch/extension.h>

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
    module.def("twice", [](const at::Tensor& values) { return values * 2; });
}
