"""The stages of the GPU check that every op goes through."""
