"""Mapping and localisation: frames in, poses and a map out; knows only the Encoder protocol."""
