"""The methods that DSKD is compared with, one in each file."""
