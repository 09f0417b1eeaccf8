"""The only part of moe-ray that knows Ray and MLflow: the core's stages, run on a cluster and tracked."""
