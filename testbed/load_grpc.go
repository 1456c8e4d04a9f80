package testbed

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// Protocols of [LoadOptions].
const (
	ProtocolHTTP1 = "http1"
	ProtocolHTTP2 = "http2"
	ProtocolGRPC  = "grpc"
)

// asker returns what sends request i and says who answered, and what closes its connections.
func (o *LoadOptions) asker() (ask1 func(i int) (string, error), closeAll func(), err error) {
	if o.Protocol != ProtocolGRPC {
		client, closeIdle := o.client()
		return func(int) (string, error) { return ask(client, o.URL) }, closeIdle, nil
	}
	u, err := url.Parse(o.URL)
	if err != nil {
		return nil, nil, err
	}
	var conns []*grpc.ClientConn
	closeAll = func() {
		for _, c := range conns {
			c.Close()
		}
	}
	for range o.Connections {
		// What the client would repeat by itself, or be told to by DNS, is to be seen here as a failure.
		c, err := grpc.NewClient("passthrough:///"+net.JoinHostPort(u.Hostname(), cmp.Or(u.Port(), "80")), grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithDisableRetry(), grpc.WithDisableServiceConfig())
		if err != nil {
			closeAll()
			return nil, nil, fmt.Errorf("a gRPC client of %s: %w", u.Host, err)
		}
		conns = append(conns, c)
	}
	return func(i int) (string, error) { return o.call(conns[i%len(conns)]) }, closeAll, nil
}

// call makes a unary call and returns who answered.
func (o *LoadOptions) call(c *grpc.ClientConn) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), o.Timeout)
	defer cancel()
	var header metadata.MD
	out := new(wrapperspb.StringValue)
	if err := c.Invoke(ctx, GRPCUnary, wrapperspb.String("hello"), out, grpc.Header(&header)); err != nil {
		return "", err
	}
	by := header.Get(ServedByHeader)
	if len(by) == 0 {
		return "", errors.New("the answer doesn't say who gave it: this isn't a server of the test-bed")
	}
	return by[0], nil
}
