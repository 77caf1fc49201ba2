"""Unordered images to poses in one linear pass: retrieval, a tree of pairs, refinement."""
