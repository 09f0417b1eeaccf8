"""Folders on any file system, the manifests that finish a stage, and fingerprints of what goes into one."""
