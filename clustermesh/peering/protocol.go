package peering

// The plugins are tools of this module, so their versions are those of go.mod; go tool -n builds one and tells where it is.
//go:generate sh -c "protoc --plugin=protoc-gen-go=`go tool -n protoc-gen-go` --plugin=protoc-gen-go-grpc=`go tool -n protoc-gen-go-grpc` --go_out=. --go_opt=paths=source_relative --go-grpc_out=. --go-grpc_opt=paths=source_relative peering.proto"
