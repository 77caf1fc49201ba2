"""Where cameras publish, as most drivers do: the names that player and launch files agree on."""

# Input of the nodes -> topic of the camera.
CAMERA_TOPICS = {'image': 'camera/image_raw', 'camera_info': 'camera/camera_info',
                 'depth': 'camera/depth/image_raw',
                 'right/image': 'camera/right/image_raw',
                 'right/camera_info': 'camera/right/camera_info'}
