"""Read and write files on disks and in buckets, with retries."""
