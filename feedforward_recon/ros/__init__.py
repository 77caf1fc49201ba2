"""ROS 2 nodes: they translate between messages and the ROS-free core, and decide nothing else."""
