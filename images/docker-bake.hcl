# What `build.py image` hands to `docker buildx bake`; every variable is set there.
variable "MODEL" {}
variable "VARIANT" {}
variable "STAGING" {}
variable "SOURCE_DATE_EPOCH" { default = "0" }
variable "PINS" {}
variable "OUTPUT" {}

target "image" {
  dockerfile = "${STAGING}/Dockerfile"
  context    = "${STAGING}/rootfs"
  contexts = {
    wheels      = "${STAGING}/wheels"
    tools       = "${STAGING}/tools"
    entrypoints = "${STAGING}/entrypoints"
  }
  target = "family"
  args = {
    MODEL             = MODEL
    VARIANT           = VARIANT
    SOURCE_DATE_EPOCH = SOURCE_DATE_EPOCH
  }
  labels = {
    "org.slipway.pins"    = PINS
    "org.slipway.model"   = MODEL
    "org.slipway.variant" = VARIANT
  }
  network    = "none"
  attest     = ["type=provenance,disabled=true"]
  tags       = ["slipway/${MODEL}:${VARIANT}"]
  output     = [OUTPUT]
}
