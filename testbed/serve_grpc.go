package testbed

import (
	"context"
	"errors"
	"io"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// The gRPC methods of a server. Their messages are google.protobuf.StringValue.
const (
	// GRPCUnary answers with what it was sent.
	GRPCUnary = "/causeway.testbed.Echo/Unary"
	// GRPCBidi answers each message with itself.
	GRPCBidi = "/causeway.testbed.Echo/Bidi"
)

// grpc answers calls; who does is in the headers as x-served-by.
func (p *pod) grpc() *grpc.Server {
	named := func() metadata.MD { return metadata.Pairs(ServedByHeader, p.name) }
	s := grpc.NewServer()
	s.RegisterService(&grpc.ServiceDesc{
		ServiceName: "causeway.testbed.Echo",
		HandlerType: (*any)(nil),
		Methods: []grpc.MethodDesc{{MethodName: "Unary", Handler: func(_ any, ctx context.Context, decode func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
			in := new(wrapperspb.StringValue)
			if err := decode(in); err != nil {
				return nil, err
			}
			if err := grpc.SetHeader(ctx, named()); err != nil {
				return nil, err
			}
			if p.sick.Load() {
				return nil, status.Error(codes.Unavailable, "told to be sick; ask for /well")
			}
			return in, nil
		}}},
		Streams: []grpc.StreamDesc{{StreamName: "Bidi", ServerStreams: true, ClientStreams: true, Handler: func(_ any, stream grpc.ServerStream) error {
			if err := stream.SendHeader(named()); err != nil {
				return err
			}
			for {
				in := new(wrapperspb.StringValue)
				if err := stream.RecvMsg(in); errors.Is(err, io.EOF) {
					return nil
				} else if err != nil {
					return err
				}
				if err := stream.SendMsg(in); err != nil {
					return err
				}
			}
		}}},
	}, p)
	grpc_health_v1.RegisterHealthServer(s, &podHealth{pod: p})
	return s
}

// podHealth is gRPC's health service, by what /sick and /well said.
type podHealth struct {
	grpc_health_v1.UnimplementedHealthServer
	pod *pod
}

func (h *podHealth) Check(context.Context, *grpc_health_v1.HealthCheckRequest) (*grpc_health_v1.HealthCheckResponse, error) {
	state := grpc_health_v1.HealthCheckResponse_SERVING
	if h.pod.sick.Load() {
		state = grpc_health_v1.HealthCheckResponse_NOT_SERVING
	}
	return &grpc_health_v1.HealthCheckResponse{Status: state}, nil
}
