"""What DSKD is compared with, each method whole in its file."""
