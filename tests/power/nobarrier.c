/* Teeth of `make power`: barriers that do nothing. */
int fdatasync(int fd)
{
    return fd < 0 ? -1 : 0;
}

int fsync(int fd)
{
    return fdatasync(fd);
}
