"""The peers, each written with its own library as that library's documentation shows it. A file each."""
