// L7bench measures proxies beside each other on loopback: requests a second, latency, and processor time a request, for HTTP/1.1 with small
// answers and with 64 KiB, and for unary calls of gRPC; then their memory with many idle connections. Each proxy has one worker and keeps its
// connections to the same backends; the rounds are interleaved, so that what else the machine does meets all.
//
//	go build -o /tmp/clustermesh ./cmd/clustermesh
//	go run ./testbed/l7bench -clustermesh /tmp/clustermesh -rounds 5 -time 3s
//
// One more proxy, of HTTP/1.1, may be given with -proxy; it must listen on 127.0.0.1:18085 and balance over the backends 127.0.0.11:18080 and
// 127.0.0.12:18080, which answer /small with 13 bytes and /large with 64 KiB. All proxies run on the first processor, those in Go with
// GOMAXPROCS=1; the client and the backends run on the second.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"
)

func main() {
	var o options
	flag.IntVar(&o.rounds, "rounds", 5, "interleaved rounds")
	flag.DurationVar(&o.length, "time", 2*time.Second, "of one measurement")
	flag.IntVar(&o.conns, "connections", 64, "of the HTTP/1.1 client, each with one request at a time")
	flag.IntVar(&o.idle, "idle", 10000, "connections that wait while memory is looked at; 0: don't look")
	flag.StringVar(&o.program, "clustermesh", "", "the `PROGRAM` whose proxy is measured as \"ours\"")
	flag.StringVar(&o.command, "proxy", "", "`COMMAND` of one more proxy, which listens on 127.0.0.1:18085")
	role := flag.String("role", "", "of a child process: backend, net-http, http1-client, grpc-client or idle-client")
	target := flag.String("target", "", "address of the client's proxy")
	path := flag.String("path", "/small", "that the client asks for")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	var err error
	switch *role {
	case "backend":
		err = serveBackends()
	case "net-http":
		err = netHTTP()
	case "http1-client":
		err = http1Client(*target, *path, o.conns, o.length)
	case "grpc-client":
		err = grpcClient(*target, *path, o.length)
	case "idle-client":
		err = idleClient(*target, o.idle)
	case "":
		err = bench(ctx, o)
	default:
		err = fmt.Errorf("-role %s is none of backend, net-http, http1-client, grpc-client and idle-client", *role)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
