# What `build.py image` passes to `docker buildx bake`. build.py sets every variable.
variable "MODEL" {}
variable "VARIANT" {}
variable "PLATFORM" {}
variable "STAGING" {}
variable "TAG" {}
variable "OUTPUT" {}
variable "PINS" {}
variable "VERSION" {}
variable "REVISION" {}
variable "ORIGIN" {}
variable "CUDA" {}
variable "DRIVER" {}
variable "MAX_JOBS" {}
variable "PROOF" {}
variable "CUDA_ARCHITECTURES" {}
# Source trees, each a folder in the store; for a source that the variant does not build, the empty folder of STAGING.
variable "NEMO" {}
variable "MEGATRON_CORE" {}
variable "TRANSFORMER_ENGINE" {}
variable "APEX" {}

target "image" {
  dockerfile = "${STAGING}/Dockerfile"
  context    = "${STAGING}/rootfs"
  contexts = {
    uv              = "${STAGING}/uv"
    locked          = "${STAGING}/locked"
    building        = "${STAGING}/building"
    variant         = "${STAGING}/variant"
    scripts         = "${STAGING}/scripts"
    files           = "${STAGING}/files"
    entrypoints     = "${STAGING}/entrypoints"
    family          = "${STAGING}/family"
    nemo-source     = NEMO
    megatron-source = MEGATRON_CORE
    te-source       = TRANSFORMER_ENGINE
    apex-source     = APEX
  }
  target = "image"
  args = {
    VARIANT              = VARIANT
    SOURCE_DATE_EPOCH    = "0"
    MAX_JOBS             = MAX_JOBS
    PROOF                = PROOF
    TORCH_CUDA_ARCH_LIST = CUDA_ARCHITECTURES
    NVTE_CUDA_ARCHS      = replace(replace(CUDA_ARCHITECTURES, ".", ""), " ", ";")
  }
  labels = {
    "org.opencontainers.image.title"       = "slipway/${MODEL}"
    "org.opencontainers.image.description" = "NeMo and Megatron for ${MODEL}, variant ${VARIANT}"
    "org.opencontainers.image.version"     = VERSION
    "org.opencontainers.image.licenses"    = "Apache-2.0"
    "org.opencontainers.image.revision"    = REVISION
    "org.opencontainers.image.source"      = ORIGIN
    "org.slipway.model"                    = MODEL
    "org.slipway.variant"                  = VARIANT
    "org.slipway.pins"                     = PINS
    "org.slipway.cuda"                     = CUDA
    "org.slipway.driver"                   = DRIVER
    "org.slipway.architectures"            = VARIANT == "cpu" ? "" : CUDA_ARCHITECTURES
  }
  platforms = [PLATFORM]
  network   = "none"
  attest    = ["type=provenance,disabled=true"]
  tags      = [TAG]
  output    = [OUTPUT]
}
