"""The commands: configuration, data sets, stages, TensorBoard board, report and export."""
