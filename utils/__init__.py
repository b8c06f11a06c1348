"""Code shared by all stages: parameters, data, losses, training, checkpoints and logs.

The layers from the top; a module imports from its own layer and those below it:

    run       run, record, networks, resume, run_directory, data_record, logger, session
    engine    supervised, evaluation, quality, teacher_cache, step, method, training, losses, means
    data      data, datasets, image_folder, gtsrb, augment
    params    params
    hardware  device, distributed, console, convolution, allocator
    base      cli, launcher, checkpoint, formats, file_kinds, results, files, memory, registry, seeds, interrupts,
              errors
"""
