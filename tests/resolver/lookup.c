/* Looks a name up with the C library's resolver: lookup NAME. Linked statically with musl. */
#include <arpa/inet.h>
#include <netdb.h>
#include <stdio.h>

int main(int count, char **arguments)
{
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *found, *each;
    int error = count == 2 ? getaddrinfo(arguments[1], NULL, &hints, &found) : EAI_NONAME;
    if (error) {
        fprintf(stderr, "%s\n", gai_strerror(error));
        return 2;
    }
    for (each = found; each; each = each->ai_next) {
        char text[INET6_ADDRSTRLEN];
        void *address = each->ai_family == AF_INET ? (void *)&((struct sockaddr_in *)each->ai_addr)->sin_addr
                                                   : (void *)&((struct sockaddr_in6 *)each->ai_addr)->sin6_addr;
        puts(inet_ntop(each->ai_family, address, text, sizeof text));
    }
    return 0;
}
