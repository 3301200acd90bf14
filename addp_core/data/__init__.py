"""Images, from files to batches: sources, decoding and cropping, the stream of batches, and corruptions."""
